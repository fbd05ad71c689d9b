"""What `train.py` needs besides the model: data, optimisation, sequence parallelism."""
