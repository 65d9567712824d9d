"""The picture of a report that README shows: a sweep of the demo model, its page, and the page in Chromium.

    OMP_NUM_THREADS=1 python benchmarks/evaluate/page.py        needs chromium on the PATH

Vectors are the refusal direction by difference in means, of 96 pairs of prompts and of 2; added at every layer but the
first in ten strengths, beside random vectors, on 12 harmless and 12 harmful test prompts. Writes
benchmarks/results/report/demo.json and demo.png.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import faststeer as fs
from faststeer import report
from faststeer.evaluate.sweep import Store, Sweep, SweepPrompt, run
from faststeer.files import write_atomically

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

FOLDER = results.FOLDER / "report"
COEFFICIENTS = [-0.5, 0, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.75, 1]
TAGS, PER_TAG = ("harmless", "harmful"), 12
SHARE = 0.9  # of the largest effect, good enough to recommend
HEIGHT = 1975  # pixels: down to the heat maps
TEXT = ("Water boils at a lower temperature in the mountains.", "A letter takes two days to arrive by train.")


def sweep(model: Any, tokenizer: Any) -> Sweep:
    harmful, harmless = fs.demo.prompts("refusal", "train")
    asked = dict(zip(("harmful", "harmless"), fs.demo.prompts("refusal", "test"), strict=True))
    return Sweep(
        [SweepPrompt(f"{tag}-{i}", asked[tag][i], tag) for i in range(PER_TAG) for tag in TAGS],
        vectors={
            "dim": fs.extract.dim(model, tokenizer, harmful[:96], harmless[:96]),
            "dim-2-pairs": fs.extract.dim(model, tokenizer, harmful[:2], harmless[:2]),
        },
        layers=[1, 2, 3, 4, 5],
        coefficients=COEFFICIENTS,
        judges=["refusal", "demo"],
        text=TEXT,
        projections=3,
    )


def main() -> None:
    chromium = shutil.which("chromium") or sys.exit("no chromium here: it takes the picture")
    demo = fs.demo.load()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        page, picture = folder / "demo.html", folder / "demo.png"
        with Store(folder / "demo.db") as store:
            run(sweep(*demo), *demo, store)
            found = report.findings(store)
            behaviour = found.measure("refusal", "harmless")
            price = found.price(behaviour, None)
            choice = report.choose(found, behaviour, price, share=SHARE)
            html = report.page(
                store, found, behaviour, price, share=SHARE, limit=None, title="Refusal on the demo model"
            )
            page.write_text(html, encoding="utf-8")
        command = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=30000"]
        command += [f"--window-size=1280,{HEIGHT}", f"--screenshot={picture}", f"file://{page}"]
        subprocess.run([chromium, *command], check=True, cwd=folder, stderr=subprocess.DEVNULL)
        write_atomically(FOLDER / "demo.png", picture.read_bytes())
    facts = {
        "what": "demo.png is the report of this sweep of the demo model: see benchmarks/evaluate/page.py",
        "machine": results.machine(),
        "run": found.run,
    }
    facts |= {"settings": len(found.lines), "prompts_a_side": PER_TAG, "coefficients": COEFFICIENTS}
    facts |= {"behaviour": behaviour.title, "price": price and price.title}
    facts["recommended"] = None if choice.recommended is None else found.lines[choice.recommended].name
    write_atomically(FOLDER / "demo.json", json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
