"""The miniature: a drawn world with exact ground truth, the models trained on it, and rules that read it back."""
