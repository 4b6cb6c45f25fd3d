"""The method, in plain PyTorch. Read it in this order; docs/method.md has the equations.

tokenizer    images <-> codes of a large codebook
clusters     codes -> coarse labels
transformer  what the two models below share
coarse       class and labels so far -> next label
fine         class and all labels -> all codes
objectives   what both are trained on
sampling     classes and random numbers -> labels -> codes
sizes        shapes, parameters and FLOPs
points       embeddings and output layers that know the codebook: an addition to the paper
"""
