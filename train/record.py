"""The end of a run: its result, and where it stands among the runs beside it."""

from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger

from arch import KVPlan
from eval.pareto import METRICS, Point, find_runs, pareto, write

from .run import constants, summarize, write_json
from .schema import PretrainConfig


def record(folder: Path, config: PretrainConfig, plan: KVPlan, val: dict[str, float], loggers: list[Logger]) -> None:
    """Write summary.json and a Pareto picture of all runs in the parent folder; put the same into the wandb run.

    The wandb summary holds `final/ppl`, `final/bpb`, `final/loss` and the `kv/...` figures as plain scalars, for its
    scatter panel.
    """
    write_json(folder / "summary.json", summarize(config, plan, val))
    points, context = pareto(find_runs([str(folder.parent)]), config.context, "ppl", config.kv_itemsize)
    picture = write(points, context, "ppl", folder / "pareto")[0]
    print(
        f"{config.name}: validation loss {val['loss']:.4f}, perplexity {val['ppl']:.3f}, "
        f"{val['bpb']:.4f} bits per byte\nrun folder: {folder}"
    )
    scalars = {f"final/{name}": value for name, value in val.items()} | constants(config, plan)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _to_wandb(logger, scalars, points, picture)


def _to_wandb(logger: WandbLogger, scalars: dict[str, float], points: list[Point], picture: Path) -> None:
    import wandb

    columns = ["name", "bytes", "value", "lowest", "highest", "seeds", "frontier"]
    rows = [[getattr(point, column) for column in columns] for point in points]
    columns[columns.index("bytes")], columns[columns.index("value")] = "kv/bytes_stored", METRICS["ppl"]
    run = logger.experiment
    run.log({"pareto/picture": wandb.Image(str(picture)), "pareto/table": wandb.Table(columns=columns, data=rows)})
    run.summary.update(scalars)
    run.finish()
