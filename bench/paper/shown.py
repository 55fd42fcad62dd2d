"""Kernel functions by name and colour."""

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"linear": "#e69f00", "piecewise_linear": "#0072b2", "sigmoid": "#009e73", "rbf": "#cc79a7"}
NAMES = {"linear": "linear (LoRA)", "piecewise_linear": "piecewise linear", "sigmoid": "sigmoid", "rbf": "RBF"}
