"""The control plane: who is here, who may go on, where all meet and what has failed. No torch in it."""
