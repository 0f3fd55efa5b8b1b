"""Writes the pictures of the site's page of notebooks: the last one of each notebook's cell tagged `picture`."""

import base64
import io
import json
from pathlib import Path

from PIL import Image

NOTEBOOKS = Path(__file__).parent
PICTURES = NOTEBOOKS.parent / "docs/assets/notebooks"


def picture(notebook: Path) -> Image.Image:
    """Returns the picture that stands for a notebook, in at most 128 colours."""
    cells = json.loads(notebook.read_text())["cells"]
    tagged = [cell for cell in cells if "picture" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook} must have one cell tagged 'picture', got {len(tagged)}")
    images = [output["data"]["image/png"] for output in tagged[0]["outputs"] if "image/png" in output.get("data", {})]
    if not images:
        raise ValueError(f"{notebook}: the cell tagged 'picture' has no picture: execute the notebook first")
    decoded = Image.open(io.BytesIO(base64.b64decode(images[-1])))
    return decoded.convert("RGB").quantize(128)


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        picture(notebook).save(PICTURES / f"{notebook.stem}.png", optimize=True)
