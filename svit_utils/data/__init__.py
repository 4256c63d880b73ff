"""Data: PlantedShapes (generated, nothing to download), CIFAR-10 (found or downloaded), pictures in folders, in shards
and with COCO's masks.

PlantedShapes needs torch only; the others import their libraries when they are asked for.
"""

from .cifar import cifar10
from .coco import CocoPicture, CocoPictures, coco, patch_shares
from .errors import DamagedDataError, DataNotFoundError
from .folders import image_folder
from .planted_shapes import DIFFICULTIES, Difficulty, PlantedBatch, PlantedShapes
from .shards import ShardStream, write_shards
from .transforms import PictureSet, Preprocessing, normalisation, preprocessing

__all__ = ["DIFFICULTIES", "DamagedDataError", "DataNotFoundError", "Difficulty", "PlantedBatch", "PlantedShapes"]
__all__ += ["PictureSet", "Preprocessing", "cifar10", "image_folder", "normalisation", "preprocessing"]
__all__ += ["CocoPicture", "CocoPictures", "ShardStream", "coco", "patch_shares", "write_shards"]
