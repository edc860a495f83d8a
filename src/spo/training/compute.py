"""The cost of the UNet's passes, in forward passes of one sample."""

TRAINED = 3  # forward and backward: a backward pass is two, as usual
DOWN_PATH = 0.4  # down and mid blocks: .33 of SD 1.5's FLOPs, .43 of SDXL's, .37 of the scenes model's
