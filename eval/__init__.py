"""Evaluation of VideoNSA with lmms-eval; installed as `videonsa_eval`. See README.md in this folder."""
