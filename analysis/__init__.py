"""The analyses of arXiv 2510.02295, a module a figure: what runs, the numbers as JSON, a plot of these.

    python -m analysis.gates path/or/hub-id --questions folder --output gates.json --plot gates.png

`questions.py` says what can be asked, `observe.py` how a forward call is looked at, `figure.py` what the commands have
in common, `paper.py` runs all of them on the small checkpoint.
"""
