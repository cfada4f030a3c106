"""The methods in PyTorch, one file each that stands alone: for diffusers' models, and what `to-torch` writes of methods.

Nothing else of this project imports them, and they import nothing of it.
"""
