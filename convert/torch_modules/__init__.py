"""The methods in PyTorch, one file each that stands alone: for diffusers' models and what `to-torch` writes for them.

Nothing else of this project imports them, and they import nothing of it.
"""
