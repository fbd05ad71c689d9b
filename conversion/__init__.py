"""What convert_weights.py is made of, besides the knowledge of the two models."""
