"""What ``fedveil simulate`` offers, as data: its help lists it without importing what carries it out."""

NOT_PRIVATE = "NOT PRIVATE (seeded noise)"  # said of every run with --debug-noise-seed
CHOICES: dict[str, tuple[str, ...]] = {
    "dataset": ("digits", "diabetes", "trivial"),
    "mode": ("distributed", "local", "client"),
    "sum": ("keysum", "sharedkey", "plain", "none"),
    "engine": ("inprocess", "ray"),
    "optimizer": ("sgd", "adam", "yogi", "adagrad"),
    "stop_metric": ("accuracy", "auc"),
    "reveal_to": ("server", "sites"),
}

NETWORKS = ("logistic", "mlp", "cnn", "resnet", "transformer", "lstm", "lora-mlp", "lora-transformer")


def listed(name: str, **remarks: str) -> str:
    """The choices of the option ``name`` in one line, each with its remark."""
    return ", ".join(f"{x} ({remarks[x]})" if x in remarks else x for x in CHOICES[name])
