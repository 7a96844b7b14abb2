"""How lowbit meets the libraries of Hugging Face, of which none has to be installed: one file for each."""
