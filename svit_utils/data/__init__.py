"""Data: PlantedShapes (generated, nothing to download), CIFAR-10 (found or downloaded) and folders of pictures.

PlantedShapes needs torch only; the other two import torchvision when they are asked for.
"""

from svit_utils.data.cifar import cifar10
from svit_utils.data.errors import DamagedDataError, DataNotFoundError
from svit_utils.data.folders import image_folder
from svit_utils.data.planted_shapes import DIFFICULTIES, Difficulty, PlantedBatch, PlantedShapes
from svit_utils.data.transforms import normalisation, preprocessing

__all__ = ["DIFFICULTIES", "DamagedDataError", "DataNotFoundError", "Difficulty", "PlantedBatch", "PlantedShapes"]
__all__ += ["cifar10", "image_folder", "normalisation", "preprocessing"]
