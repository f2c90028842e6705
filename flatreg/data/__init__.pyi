"""Public names; lazy, because the measures import the lower files of this room."""

from .image_files import Folder as Folder, Timm as Timm
from .images import ImageArrays as ImageArrays, Source as Source, Splits as Splits
from .images import Images as Images, augment as augment
from .sources import Array as Array, Data as Data, Digits as Digits, source_name as source_name
from .streamed import StreamedImages as StreamedImages
from .torchvision import Torchvision as Torchvision
