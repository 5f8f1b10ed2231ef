"""How ranks are laid out, and their process groups."""
