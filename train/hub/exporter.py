"""Export of one checkpoint: write the folder, verify it in a fresh process, and give it its name."""

import re
import shutil

from rich.console import Console

from eval.environment import installed
from eval.footprint import plan_tables
from train import checkpoint
from train.errors import TrainingError
from train.hub.card import write_card
from train.hub.checkpoint_reader import CheckpointReader
from train.hub.folder_writer import write_settings, write_tokenizer, write_weights
from train.hub.records import Check, Corpus, ExportUnderTest
from train.hub.request import ExportRequest
from train.hub.run_info import describe_training, load_corpus
from train.hub.targets import Target, select_target
from train.hub.upload import check_push, push
from train.hub.verify import table, verify
from train.loading import run_of
from train.run import load_config
from train.tensor_pieces import COMPUTE_DTYPES

NUM_WINDOWS = 4  # of validation text, on which perplexity is compared


def export_checkpoint(request: ExportRequest, console: Console) -> list[Check]:
    """Write the folder, verify it, and give it its name. Returns the checks, none of which failed.

    Raises one of MISTAKES where the model cannot be exported like that; ConversionError or TrainingError where the
    checkpoint is broken, the folder cannot be written (nothing is left of it) or is not the model (it stays, under
    `ExportRequest.partial`).
    """
    options = request.options
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)
    folder = checkpoint.resolve(request.checkpoint)
    reader = CheckpointReader(folder)
    config, plan = reader.model()
    target, refused = select_target(config, plan, options.target)
    reader.check(target.weights)
    run = run_of(folder)
    run_config = None if run is None else load_config(run)
    tied = checkpoint.identity_of(folder, run)
    corpus = load_corpus(folder, run_config, options.prepared, NUM_WINDOWS, tied)
    training = describe_training(folder, run, run_config, reader.info, options.prepared, tied)
    console.print(*plan_tables(request.out.name, plan, config.size.seq_len, 2))
    for name, reason in refused.items():
        console.print(f"target {name} passed over:\n{reason}", soft_wrap=True)
    console.print(f"target: {target.name}, {target.model_class}; {len(target.weights)} tensors in {options.dtype}")
    if target.code and (odd := re.search(r"[^\w.-]", request.out.name)):
        console.print(
            f"note: transformers imports the code as a module of the folder's name, and warns of {odd[0]!r} in it each "
            "time it loads the model; out= with letters, digits and . _ - alone keeps it quiet",
            soft_wrap=True,
        )
    dtype, partial = COMPUTE_DTYPES[options.dtype], request.partial
    try:
        write(request, reader, target, corpus)
        exported = ExportUnderTest(folder, partial, config, target, dtype, corpus)
        checks = run_checks(exported, console) if options.verify else []
        version = f"transformers {installed('transformers')} and torch {installed('torch')}"
        name = options.push_to_hub or request.out.name
        write_card(partial, name, config, plan, target, training, corpus, checks, version, options.license)
        partial.rename(request.out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror or str(error)
        raise TrainingError(f"cannot write {request.out}: {reason}; give another folder with out=") from error
    console.print(f"exported: {request.out}", soft_wrap=True)
    if options.license is None:
        console.print(
            "its card names no license; license= of this command does, or a line in README.md", soft_wrap=True
        )
    if options.push_to_hub is not None:
        console.print(f"pushed: {push(request.out, options.push_to_hub)}", soft_wrap=True)
    return checks


def write(request: ExportRequest, reader: CheckpointReader, target: Target, corpus: Corpus) -> None:
    """Write all of the folder but its card. Leaves nothing if that fails."""
    folder, size, dtype = request.partial, target.config, COMPUTE_DTYPES[request.options.dtype]
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_settings(folder, target, dtype, corpus)
        write_tokenizer(folder, corpus, size["vocab_size"], size["max_position_embeddings"])
        write_weights(folder, reader, target.weights, dtype, request.shard_bytes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def run_checks(exported: ExportUnderTest, console: Console) -> list[Check]:
    """Verify the folder and print the checks. Raises TrainingError if one failed; the folder stays for inspection."""
    console.print("verifying in a fresh process")
    checks = verify(exported)
    console.print(table(checks, f"transformers {installed('transformers')}, in a fresh process"))
    failed = [check for check in checks if check.passed is False]
    if failed:
        lines = "\n".join(f"{check.name}: {check.found}, not {check.wanted}" for check in failed)
        raise TrainingError(
            f"what was written is not the model that was trained; it is kept as {exported.folder}\n{lines}"
        )
    return checks
