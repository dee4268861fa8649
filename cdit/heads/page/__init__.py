"""The interactive page of attention heads: one HTML file that needs no server and no network.

`builder` gathers frames, weights and measures and writes the file; `compression` makes the weights small. What runs in
the browser is page.html and page.css with decode.js, drawing.js, heads.js and page.js, put into the file as they are.
"""

from cdit.heads.page.builder import AttentionPage, HeadInfo
from cdit.heads.page.compression import affordable_top_k

__all__ = ["AttentionPage", "HeadInfo", "affordable_top_k"]
