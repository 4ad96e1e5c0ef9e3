"""What the programs need and no equation is in: the command line, files, images, data sets,
checkpoints, a run's folder, the processes that torchrun starts, and the network of the FID.
"""
import torch

# With TF32, the sample of a seed would depend on the batch that it is drawn in.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
