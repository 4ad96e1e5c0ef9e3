"""A hot process trained at higher noise levels: P_mean is -0.9 instead of -1.2. For --bnr 0."""
from degrade import ConstantBNR


class HigherLevels(ConstantBNR):
    P_mean = -0.9


schedule = HigherLevels(0)
