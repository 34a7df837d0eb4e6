"""What a package index shows: project addresses, and the README with links that lead somewhere from there."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ADDRESS = "FITV2_REPOSITORY"
LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|mailto:|#)([^)\s]+)\)")


class Metadata(MetadataHookInterface):
    """Gives a build its README and the addresses of the repository that it is built in."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in what pyproject.toml calls dynamic."""
        root, text = Path(self.root), (Path(self.root) / "README.md").read_text(encoding="utf-8")
        address = os.environ.get(ADDRESS, "").rstrip("/").removesuffix(".git") or origin(root)
        metadata["urls"] = addresses(address) if address else {}
        text = absolute(text, address) if address else text
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def origin(root: Path) -> str:
    """The web address of the repository that a checkout was cloned from; empty if it has none."""
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "remote", "get-url", "origin"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""
    found = re.sub(r"^(?:ssh://git@([^:/]+)(?::\d+)?/|git@([^:/]+):)", r"https://\1\2/", found)
    found = found.removesuffix(".git")
    return found if re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+", found) else ""


def addresses(address: str) -> dict[str, str]:
    """Where people look for a project."""
    return {
        "Homepage": address, "Documentation": f"{address}/tree/HEAD/docs", "Issues": f"{address}/issues",
        "Source": address,
    }  # fmt: skip


def absolute(text: str, address: str) -> str:
    """Markdown whose relative links lead into the repository, and whose pictures are shown from there."""
    return LINK.sub(lambda m: f"{m[1]}{m[2]}({address}/{'raw' if m[1] else 'blob'}/HEAD/{m[3]})", text)
