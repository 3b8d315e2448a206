"""mkdocs hook: files outside docs/ that the pages link to become part of the site."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]


def on_files(files, config):
    """Adds the guide to TPU slices and the default configuration."""
    guide = (ROOT / "tpu" / "README.md").read_text(encoding="utf-8").replace("](../docs/", "](")
    files.append(File.generated(config, "tpu.md", content=guide))
    tiny = str(ROOT / "configs" / "tiny.yaml")
    files.append(File.generated(config, "configs/tiny.yaml", abs_src_path=tiny))
    return files


def on_page_markdown(markdown, **_):
    """Points links at them."""
    return markdown.replace("](../tpu/README.md)", "](tpu.md)").replace("](../configs/", "](configs/")
