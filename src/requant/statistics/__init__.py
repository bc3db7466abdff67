"""What the inputs of layers looked like on a text: statistics files, ours and llama.cpp's.

``files`` reads and writes ours, ``imatrix`` reads llama.cpp's two forms, ``names`` knows that
two names mean one layer, ``layers`` answers for a layer of a model. Vectors and Hessians stay
on the disk until they are asked for, so nothing here grows with the model.
"""

from requant.statistics.files import LayerStatistics, read_statistics, write_statistics
from requant.statistics.layers import Importance, MatrixStatistics, StatisticsFile, statistics_error

__all__ = [
    "Importance",
    "LayerStatistics",
    "MatrixStatistics",
    "StatisticsFile",
    "read_statistics",
    "statistics_error",
    "write_statistics",
]
