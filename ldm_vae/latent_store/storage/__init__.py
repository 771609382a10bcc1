"""Files of a store, wherever it lies, and the proof that one is whole."""
