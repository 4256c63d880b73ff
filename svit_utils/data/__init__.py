"""Data: PlantedShapes (generated, nothing to download), CIFAR-10 (found or downloaded) and folders of pictures.

PlantedShapes needs torch only; the other two import torchvision when they are asked for.
"""

from .cifar import cifar10
from .errors import DamagedDataError, DataNotFoundError
from .folders import image_folder
from .planted_shapes import DIFFICULTIES, Difficulty, PlantedBatch, PlantedShapes
from .transforms import PictureSet, Preprocessing, normalisation, preprocessing

__all__ = ["DIFFICULTIES", "DamagedDataError", "DataNotFoundError", "Difficulty", "PlantedBatch", "PlantedShapes"]
__all__ += ["PictureSet", "Preprocessing", "cifar10", "image_folder", "normalisation", "preprocessing"]
