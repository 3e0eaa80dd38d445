"""What the tests share, made once per session: two tiny models with random weights, a Ray cluster, an S3 server, and a finished run.

Nothing is downloaded.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from making.tasks import tiny, write_task
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from retrikt_ray.pipeline import Run

torch.set_num_threads(1)

LONGEST = ("test_pipeline.py", "test_jobs.py", "test_wheel.py", "test_app.py")  # begun first, so that no worker ends with them alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


SENTENCES = [
    "a fine film with a warm heart",
    "the play is dull and the cast is weak",
    "never was a plot so brave and so sharp",
    "a cold and slow film that nobody needs",
    "the cast was very fine, the music warm",
    "positive: a brave play. negative: a dull one",
]


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a Llama with 2 layers of 32 dimensions and a byte-level BPE of 300 tokens; weights wide enough for sharp answers."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return saved(tmp_path_factory.mktemp("tiny_lm"), model, tokenizer)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a BERT with 1 layer of 32 dimensions and a WordPiece tokenizer of the words of SENTENCES and the letters."""
    words = sorted({w for s in SENTENCES for w in s.replace(",", " ").replace(".", " ").replace(":", " ").split()})
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *",.:",
        *letters,
        *("##" + c for c in letters),
        *(w for w in words if len(w) > 1),
    ]
    plain = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    plain.normalizer = normalizers.BertNormalizer()
    plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    plain.decoder = decoders.WordPiece()
    plain.post_processor = processors.BertProcessing(("[SEP]", tokens.index("[SEP]")), ("[CLS]", tokens.index("[CLS]")))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return saved(tmp_path_factory.mktemp("tiny_encoder"), BertModel(config), tokenizer)


def saved(folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> str:
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket on an S3 server of this process; its address is in the environment, which Ray's workers inherit."""
    from moto.server import ThreadedMotoServer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {k: os.environ.get(k) for k in settings}
    os.environ.update(settings)
    import s3fs

    s3fs.S3FileSystem().mkdir("runs")
    yield "s3://runs"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="session")
def cluster_of(s3: str) -> Iterator[Callable[[int], None]]:
    """Makes this process's Ray cluster one of so many CPUs; it is started again only where it was of another size."""
    import ray

    size = 0

    def ensure(cpus: int) -> None:
        nonlocal size
        if size != cpus:
            ray.shutdown()
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
            size = cpus

    yield ensure
    ray.shutdown()


@pytest.fixture
def cluster(cluster_of: Callable[[int], None]) -> None:
    """A Ray cluster of four CPUs."""
    cluster_of(4)


@pytest.fixture(scope="session")
def run(cluster_of: Callable[[int], None], tiny_lm: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of single-text classification; tests that change it work on a copy. Made by the first process of pytest-xdist that needs it."""
    from filelock import FileLock

    from retrikt_ray import config, pipeline

    cluster_of(4)
    home = tmp_path_factory.getbasetemp()
    shared = (home.parent if "PYTEST_XDIST_WORKER" in os.environ else home) / "run-of-all"
    with FileLock(f"{shared}.lock"):
        if not (shared / "done").exists():
            shutil.rmtree(shared, ignore_errors=True)
            prepare = {"data": str(write_task(shared / "data")), "n_per_class": 12, "unlabelled": "train"}
            text = yaml.safe_dump(tiny(tiny_lm, prepare=prepare, generate={"workers": 2}))
            pipeline.run_all(pipeline.open_run(str(shared / "run"), config.parse(text, "test")))
            (shared / "done").touch()
    return pipeline.load_run(str(shutil.copytree(shared / "run", tmp_path_factory.mktemp("run") / "run")))
