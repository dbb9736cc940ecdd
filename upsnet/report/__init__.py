"""One self-contained page about a run: scores, where panoptic quality is lost, curves, a gallery to look into."""

from upsnet.report.gallery import GalleryItem, choose_images
from upsnet.report.page import write_report

__all__ = ["GalleryItem", "choose_images", "write_report"]
