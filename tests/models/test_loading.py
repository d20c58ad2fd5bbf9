"""What cannot be loaded is one line: gated, missing, another revision, broken cards, one's own files."""

import hashlib
import json
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from support import hub

from configs import UserError
from models import loading, lora_student
from models.architectures import ARCHITECTURES
from models.cards import card
from models.families import Family
from models.loading import available, fetch, network
from models.sampler import alone, draw_noise, finish


@pytest.fixture(scope="module")
def cache(cache):
    """A Hub cache with the small SD 2.1 under its real names."""
    hub.write(cache, "sd21")
    return cache


def family(folder, card: dict) -> Family:
    (folder / "my.yaml").write_text(json.dumps(card))
    return Family(str(folder / "my.yaml"), dtype=torch.float32)


class Gate(BaseHTTPRequestHandler):
    """Answers as the Hub does for a gated repository without a token, and for one that does not exist."""

    def do_HEAD(self):
        gated = "/gated/" in self.path
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header(
            "X-Error-Message", "Access to model is restricted" if gated else "Repository not found"
        )
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A local Hub that refuses everybody."""
    server = HTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    yield
    server.shutdown()


@pytest.mark.parametrize(
    ("repo", "says"),
    [
        (
            "the/gated",
            "gated: accept the licence on its page at huggingface.co, then `hf auth login` or set HF_TOKEN",
        ),
        ("the/absent", "the Hub knows no such repository, or it is private"),
    ],
)
def test_a_repository_that_is_closed(online, repo, says):
    with pytest.raises(UserError, match=says) as error:
        fetch(UNet2DConditionModel, repo, subfolder="unet")
    assert str(error.value).startswith(f"cannot load {repo}: ") and "\n" not in str(error.value)


def test_a_repository_that_is_not_in_the_cache(cache, tmp_path):
    student = {"extends": "sd21", "members": {"mine": {"repo": "nobody/nothing"}}}
    with pytest.raises(
        UserError, match="nobody/nothing: it is not in the cache, and HF_HUB_OFFLINE keeps it"
    ):
        family(tmp_path, student).member("mine")


@pytest.mark.parametrize("field", ["file", "lora"])
def test_a_missing_file(cache, tmp_path, field):
    for repo, says in (
        ("stabilityai/sd-turbo", "it is not in the cache"),
        (str(tmp_path), "there is no such file"),
    ):
        with pytest.raises(UserError, match=f"cannot load gone.safetensors of .*: {says}"):
            family(
                tmp_path, {"extends": "sd21", "members": {"mine": {"repo": repo, field: "gone.safetensors"}}}
            ).member("mine")


def test_another_revision_than_the_pinned_one_is_used_with_a_warning(cache, tmp_path):
    pinned = {"extends": "sd21", "members": {"turbo": {"revision": "0" * 40}}}
    other = card("sd21").members["turbo"].revision
    with pytest.warns(
        UserWarning,
        match=f"stabilityai/sd-turbo: the card pins revision 000000000000, the cache holds only {other[:12]}",
    ):
        family(tmp_path, pinned).member("turbo")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert (
            available("stabilityai/sd-turbo", other) == other
            and available("stabilityai/sd-turbo", "main") == "main"
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"extends": "sd21", "sise_px": 64}, "unknown key 'sise_px'; did you mean 'size_px'"),
        ({"extends": "sd12"}, "no family 'sd12': there are flux, klein"),
        ({"extends": "sd21", "architecture": "sd4"}, "no architecture 'sd4'; there are sdxl, sd,"),
        (
            {"extends": "sd21", "members": {"mine": {"noise_schedule": "flow"}}},
            "member mine has noise_schedule flow and prediction_type eps",
        ),
        ({"extends": "sd21", "members": {"mine": {"file": "a", "lora": "b"}}}, "a file or a lora, not both"),
        ({"extends": "sd21", "members": {"base": {"lora": "b"}}}, "the base has no lora"),
    ],
)
def test_a_wrong_card(tmp_path, text, says):
    with pytest.raises(UserError, match=says) as error:
        family(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_card_that_extends_itself(tmp_path):
    with pytest.raises(UserError, match="extends itself"):
        family(tmp_path, {"extends": str(tmp_path / "my.yaml")})


# one's own files


def drawn(found: Family, name: str) -> torch.Tensor:
    member = found.member(name)
    with torch.no_grad():
        return finish(
            alone(member), draw_noise([3], found.latent_shape, len(member.levels)), found.encode(["a cat"])
        )


def test_a_member_on_disk_is_a_card_of_a_few_lines(cache, tmp_path):
    net = hub.unet(9, sdxl=False)
    save_file(hub.half(net), tmp_path / "mine.safetensors")
    save_file(hub.lora(net, 5), tmp_path / "mine-lora.safetensors")
    sampled = {"steps": 4, "spacing": "trailing"}
    found = family(
        tmp_path,
        {
            "extends": "sd21",
            "size_px": 64,
            "members": {
                "mine": {"file": str(tmp_path / "mine.safetensors"), **sampled},
                "mine-lora": {"lora": str(tmp_path / "mine-lora.safetensors"), "lora_scale": 0.5, **sampled},
            },
        },
    )
    assert (
        list(found.card.members) == ["base", "v", "turbo", "mine", "mine-lora"] and found.card.name == "sd21"
    )
    assert torch.equal(found.member("mine").denoiser.net.conv_in.weight, net.conv_in.weight.half().float())
    assert found.member("mine-lora").denoiser.lora_scale == 0.5
    assert not torch.equal(drawn(found, "mine"), drawn(found, "mine-lora"))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {
                "lora_unet_nowhere_to_q.lora_down.weight": (1, 64),
                "lora_unet_nowhere_to_q.lora_up.weight": (64, 1),
            },
            "no LoRA of a UNet2D",
        ),
        (
            {
                "lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_down.weight": (1, 64),
                "lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_up.weight": (64, 1),
            },
            "holds text_encoder",
        ),
        ({"conv_in.weight": (16, 4, 3, 3)}, "no LoRA of a UNet2D"),
    ],
)
def test_a_lora_that_is_none_of_this_network(tmp_path, tensors, says):
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=says):
        lora_student.read(tmp_path / "lora.safetensors", ARCHITECTURES["sd"], hub.unet(0, sdxl=False))


def test_pixart_takes_no_lora(tmp_path):
    with pytest.raises(UserError, match="PixArtAlphaPipeline takes no LoRA"):
        lora_student.read(tmp_path / "any.safetensors", ARCHITECTURES["pixart"], hub.transformer("pixart", 0))


def test_a_checkpoint_in_the_original_layout_is_a_member(cache, tmp_path):
    """Through diffusers' from_single_file, with the base's config from the cache."""
    net = hub.unet(9, sdxl=False)
    save_file(
        {**hub.original(net), "first_stage_model.decoder.conv_in.bias": torch.zeros(4)},
        tmp_path / "civitai.safetensors",
    )
    mine = family(
        tmp_path, {"extends": "sd21", "members": {"mine": {"file": str(tmp_path / "civitai.safetensors")}}}
    )
    loaded = mine.member("mine").denoiser.net.state_dict()
    assert all(torch.equal(loaded[key], weight.half().float()) for key, weight in net.state_dict().items())


def test_of_a_checkpoint_its_network_alone_is_read_and_in_the_type_that_is_asked_for(
    cache, tmp_path, monkeypatch
):
    read, given, opening, single = [], [], loading.safe_open, UNet2DConditionModel.from_single_file

    class Counted:
        def __init__(self, *args, **options):
            self.file = opening(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(loading, "safe_open", Counted)
    monkeypatch.setattr(
        UNet2DConditionModel, "from_single_file", lambda *a, **o: given.append(o["dtype"]) or single(*a, **o)
    )
    others = {
        "first_stage_model.decoder.conv_in.bias": torch.zeros(4),
        "conditioner.embedders.0.a": torch.zeros(9),
    }
    save_file({**hub.original(hub.unet(9, sdxl=False)), **others}, tmp_path / "all.safetensors")
    net = network(
        family(
            tmp_path, {"extends": "sd21", "members": {"mine": {"file": str(tmp_path / "all.safetensors")}}}
        ).card,
        "mine",
        torch.bfloat16,
    )
    assert read and not set(others) & set(read) and given == [torch.bfloat16]
    assert {weight.dtype for weight in net.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_a_file_is_mapped_and_not_read(tmp_path, end):
    tensors, path = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}, tmp_path / f"net.{end}"
    save_file(tensors, path) if end == "safetensors" else torch.save({"state_dict": tensors}, path)
    found = loading.plain_weights(path)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors) and found.keys() == tensors.keys()
    assert str(path) in Path("/proc/self/maps").read_text()


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    hashed, digest, path = [], hashlib.file_digest, tmp_path / "large.bin"
    monkeypatch.setattr(loading.hashlib, "file_digest", lambda *args: hashed.append(args) or digest(*args))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(loading, "LARGE", 4)
    path.write_bytes(b"weights")
    first = [loading.file_hash(path) for _ in range(3)]
    assert set(first) == {hashlib.sha256(b"weights").hexdigest()} and len(hashed) == 1
    path.write_bytes(b"other weights")
    assert loading.file_hash(path) == hashlib.sha256(b"other weights").hexdigest() and len(hashed) == 2
    (tmp_path / "home/distilled-control-hashes.json").write_text("not what was written")
    assert loading.file_hash(path) == hashlib.sha256(b"other weights").hexdigest() and len(hashed) == 3
    path.write_bytes(b"abc")  # small: read anew, nothing is kept
    assert loading.file_hash(path) == loading.file_hash(path) and len(hashed) == 5
