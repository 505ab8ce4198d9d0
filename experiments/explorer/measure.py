"""What the explorer's page does in a browser: frames while dragging, its size, its error.

    python experiments/explorer/measure.py RUN_DIR... [--screenshot FILE.png]

Each run's page is written as `jaxvae explore` does and opened in headless Chromium. What is
measured is written as results/RUN.json beside this file. The screenshot is of the first run.

A frame is a new point of the plane, decoded and drawn. The pointer is moved once in every frame,
in a figure of eight, for some seconds. The browser draws no more than 60 frames a second, so the
time of decoding alone is told as well.
"""

import argparse
import io
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

import jaxvae
from jaxvae import explorer
from jaxvae.runs.config import read_config
from jaxvae.runs.data import load_run_data

HERE = Path(__file__).parent
SECONDS = 6
GRID = 15

DRAG = """async (seconds) => {
    const plane = document.getElementById("plane"), box = plane.getBoundingClientRect();
    const began = performance.now(), times = [];
    for (;;) {
        const now = await new Promise(requestAnimationFrame);
        times.push(now);
        const gone = (performance.now() - began) / 1000;
        if (gone > seconds) break;
        plane.dispatchEvent(new PointerEvent("pointermove", {
            clientX: box.left + box.width * (0.5 + 0.4 * Math.sin(gone)),
            clientY: box.top + box.height * (0.5 + 0.4 * Math.sin(2 * gone)),
        }));
    }
    return [times, explorer.state().frames];
}"""
DECODING = """([points, label]) => points.map((z) => {
    const began = performance.now();
    explorer.decode(z, label);
    return performance.now() - began;
})"""
DECODED = "([points, label]) => points.map((z) => explorer.decode(z, label))"


def measured(page: Page, path: Path, params: jaxvae.Params) -> dict:
    page.goto(path.as_uri())
    page.evaluate(DRAG, 1)
    before = page.evaluate("explorer.state().frames")
    times, after = page.evaluate(DRAG, SECONDS)
    rates = 1000 / np.diff(times)
    latents, classes = params.config.latent_dim, params.config.num_classes
    side = np.linspace(-2, 2, GRID, dtype=np.float32)
    z = np.zeros((GRID * GRID, latents), np.float32)
    z[:, :2] = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)[:, :latents]
    errors = []
    for label in range(max(1, classes)):
        got = np.array(page.evaluate(DECODED, [z.tolist(), label]))
        labels = jnp.full(len(z), label) if classes else None
        expected = np.asarray(jaxvae.decode(params, z, labels).mean).reshape(len(z), -1)
        errors.append(np.abs(got - expected).max())
    decoding = page.evaluate(DECODING, [z.tolist(), 0])
    return {
        "model": explorer.title_of(params),
        "image_shape": list(params.config.image_shape),
        "browser": f"Chromium {page.context.browser.version}, headless",
        "load_average": round(os.getloadavg()[0], 1),  # what else the machine was doing
        "seconds": SECONDS,
        "frames": after - before,
        "frames_per_second_median": round(float(np.median(rates)), 1),
        "frames_per_second_5th_percentile": round(float(np.percentile(rates, 5)), 1),
        "milliseconds_to_decode_median": round(float(np.median(decoding)), 2),
        "milliseconds_to_decode_5th_percentile": round(float(np.percentile(decoding, 5)), 2),
        "page_bytes": path.stat().st_size,
        "largest_pixel_error": float(f"{max(errors):.2g}"),
        "pixels_compared": len(z) * len(errors) * expected.shape[1],
    }


def screenshot(page: Page, file: Path) -> None:
    """The page with its first test image chosen and the pointer at rest on the plane."""
    page.check("#tiles")
    while page.evaluate("explorer.state().tiling"):
        page.wait_for_timeout(100)
    box = page.locator("#plane").bounding_box()
    x, y = page.evaluate("explorer.state().points[0]")
    page.mouse.click(box["x"] + 1 + x, box["y"] + 1 + y)
    page.mouse.move(box["x"] + 0.42 * box["width"], box["y"] + 0.36 * box["height"])
    page.wait_for_timeout(500)
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        levels = np.asarray(picture.convert("RGB"), np.float32) / 5
    # 52 levels of each colour make half the bytes of 256.
    Image.fromarray((5 * np.round(levels)).astype(np.uint8)).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--screenshot", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    (HERE / "results").mkdir(exist_ok=True)
    pages = []
    for run_dir in options.runs:
        params = jaxvae.load(run_dir)
        path = run_dir.resolve() / "explorer.html"
        explorer.write(path, params, load_run_data(read_config(run_dir)), run_dir.name)
        pages.append((path, params))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for run_dir, (path, params) in zip(options.runs, pages, strict=True):
            page = browser.new_page(viewport={"width": 1280, "height": 930})
            found = measured(page, path, params)
            print(run_dir.name, json.dumps(found, indent=1))
            text = json.dumps(found, indent=1) + "\n"
            (HERE / "results" / f"{run_dir.name}.json").write_text(text)
            if options.screenshot and run_dir == options.runs[0]:
                screenshot(page, options.screenshot)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
