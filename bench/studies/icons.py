"""Make a labelled set of pictures of icon themes: a class is an icon's name, its images the themes'.

    apt-get download oxygen-icon-theme gnome-icon-theme paper-icon-theme moka-icon-theme \
        obsidian-icon-theme faenza-icon-theme elementary-xfce-icon-theme lxde-icon-theme
    for deb in *.deb; do dpkg-deb -x "$deb" themes/"${deb%%_*}"; done
    python bench/studies/icons.py themes runs/icons

writes `train/NAME/THEME.png` and, of the same layout, `test/` (of every class that is trained on one
theme's icon) and `unseen/` (classes that training never sees), and `classes.tsv` (label, name). Icons
of one name show one idea in the styles of several artists: image search has to find what is meant,
drawn by another hand. Icons are on white, at the size nearest to 160 pixels that a theme has.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from pathlib import Path

from PIL import Image

FEWEST_THEMES, SMALLEST, SIZE = 4, 48, 160
UNSEEN = 0.25  # of the classes
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("themes", type=Path, help="folder with an unpacked package each")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    classes = {
        name: themes
        for name, themes in sorted(icons(arguments.themes).items())
        if len(themes) >= FEWEST_THEMES
    }
    generator = random.Random(SEED)
    unseen = set(generator.sample(sorted(classes), round(UNSEEN * len(classes))))
    for name, themes in classes.items():
        tested = generator.choice(sorted(themes))
        for theme, path in themes.items():
            split = "unseen" if name in unseen else "test" if theme == tested else "train"
            target = arguments.out / split / name / f"{theme}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                icon = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            page = Image.new("RGBA", icon.size, "white")
            Image.alpha_composite(page, icon).convert("RGB").save(target)
    rows = [f"{name}\t{re.sub(r'[-_]+', ' ', name)}\n" for name in classes]
    (arguments.out / "classes.tsv").write_text("label\tname\n" + "".join(rows), encoding="utf-8")


def icons(themes: Path) -> dict[str, dict[str, Path]]:
    """By icon's name and theme: the PNG file nearest to `SIZE`; links are other names of an icon."""
    found: dict[str, dict[str, tuple[int, Path]]] = defaultdict(dict)
    for path in sorted(themes.rglob("*.png")):
        theme = path.relative_to(themes).parts[0]
        sizes = re.findall(r"/(\d+)(?:x\d+)?/", str(path))
        if path.is_symlink() or not sizes or int(sizes[-1]) < SMALLEST:
            continue
        distance = abs(int(sizes[-1]) - SIZE)
        known = found[path.stem].get(theme)
        if known is None or distance < known[0]:
            found[path.stem][theme] = (distance, path)
    return {name: {theme: path for theme, (_, path) in of.items()} for name, of in found.items()}


if __name__ == "__main__":
    main()
