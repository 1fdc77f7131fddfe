"""Models: a table of known ones, and loading."""

import threading

# Held while any model is loaded: diffusers and transformers patch torch for the whole process meanwhile (weights
# of another thread's model would end up on the meta device).
LOADING = threading.RLock()
