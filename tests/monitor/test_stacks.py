"""Stacks of blocks: mixed classes, lists of lists, stages, backbones, towers, and what is no block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.watched_models import WIDTH, Attention, FeedForward, adamw, close_to, signal, train_watched
from torch import Tensor, nn

from omninorm.monitor.model_map.structure import find_structure


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.one(x))
        return x + self.mlp(self.two(x))


class OtherBlock(Block):
    """A block of another class."""


class Stack(nn.Module):
    """Calls the layers of a list in turn."""

    def __init__(self, *layers: nn.Module, norm: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Stage(nn.Module):
    """Blocks and a layer after them, as in hierarchical vision models."""

    def __init__(self, depth: int, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(depth))
        self.downsample = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class ConvBlock(nn.Module):
    """As in ConvNeXt: tokens are mixed by a convolution."""

    def __init__(self, linear: bool = True) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        size = (2 * WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, size[0]) if linear else nn.Conv1d(WIDTH, size[0], 1)
        self.down = nn.Linear(*size) if linear else nn.Conv1d(*size, 1)


class ConvLayer(nn.Module):
    """As in the feature extractor of wav2vec 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, stride=2), nn.LayerNorm(WIDTH)


class Patches(ConvLayer):
    """As in PVT: a convolution with a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 9, WIDTH))


class SubLayer(nn.Module):
    """A norm and a function, as the parts of a block in T5."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.norm, self.function = nn.LayerNorm(WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(self.norm(x))


class CrossLayer(SubLayer):
    """A sublayer of another class."""


class PartsBlock(nn.Module):
    """A block whose sublayers are in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([SubLayer(Attention()), CrossLayer(FeedForward())])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


def names(model: nn.Module) -> list[list[str]]:
    """Return the names of the blocks of each chain."""
    structure = find_structure(model)
    return [[structure.blocks[at].name for at in chain] for chain in structure.chains]


def test_blocks_of_several_classes_are_one_stack() -> None:
    """As in Jamba and other hybrids."""
    mixed = Stack(Block(), Block(), OtherBlock(), Block())
    assert names(mixed) == [[f"layers.{at}" for at in range(4)]]
    assert names(Stack(Block(), OtherBlock())) == [["layers.0", "layers.1"]]
    assert names(nn.Sequential(nn.Linear(4, WIDTH), Block(), OtherBlock(), Block())) == [["1", "2", "3"]]


def test_backbone_in_a_sequential_is_no_block() -> None:
    model = nn.Sequential(Stack(Block(), Block()), nn.Linear(WIDTH, 3))
    assert names(model) == [["0.layers.0", "0.layers.1"]]
    head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    assert names(nn.Sequential(Stack(Block(), Block()), head)) == [["0.layers.0", "0.layers.1"]]
    assert names(nn.Sequential(Stack(Block()), nn.Identity(), nn.Linear(WIDTH, 3))) == [["0.layers.0"]]


def test_blocks_of_stages_are_taken_in_order() -> None:
    model = Stack(Stage(2), Stage(1), Stage(3))
    wanted = [[f"layers.{stage}.blocks.{at}" for at in range(depth)] for stage, depth in enumerate((2, 1, 3))]
    assert names(model) == wanted
    of_lists = nn.ModuleList([nn.ModuleList([Block()]), nn.ModuleList([Block(), Block()])])  # as in PVT
    assert names(of_lists) == [["0.0"], ["1.0", "1.1"]]


@pytest.mark.parametrize("linear", [True, False])
def test_convolution_blocks_of_stages_are_taken(linear: bool) -> None:
    model = Stack(Stage(1, lambda: ConvBlock(linear)), Stage(2, lambda: ConvBlock(linear)))  # type: ignore[arg-type]
    assert names(model) == [["layers.0.blocks.0"], ["layers.1.blocks.0", "layers.1.blocks.1"]]


def test_layers_of_a_feature_extractor_are_no_blocks() -> None:
    for kind in (ConvLayer, Patches):
        extractor = nn.ModuleList([kind(), kind(), kind()])
        model = nn.ModuleDict({"extractor": extractor, "encoder": Stack(Block(), Block())})
        assert names(model) == [["encoder.layers.0", "encoder.layers.1"]]


def test_list_of_sublayers_in_a_block_is_no_stage() -> None:
    assert names(Stack(PartsBlock(), PartsBlock())) == [["layers.0", "layers.1"]]
    experts = Block()
    experts.experts = nn.ModuleList(FeedForward() for _ in range(3))
    assert names(Stack(experts, Block())) == [["layers.0", "layers.1"]]


def test_towers_are_separate_chains() -> None:
    model = nn.ModuleDict({"text": Stack(Block(), Block()), "image": Stack(Block(), Block(), Block())})
    assert [len(chain) for chain in names(model)] == [2, 3]
    watched = train_watched(Towers(), None, 1, lambda m, s: m(torch.ones(2, 5, WIDTH)).square().mean())
    assert watched.history.facts.chains == ((0, 1), (2, 3, 4))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Stack(Block(), Block()), Stack(Block(), Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.text(x) + self.image(x)


def test_adapter_after_the_feed_forward_is_not_the_writer() -> None:
    block = Block()
    block.per_layer_projection = nn.Linear(4, WIDTH)
    (found, _) = find_structure(Stack(block, Block())).blocks
    assert found.feed_forward == "layers.0.mlp"
    assert found.feed_forward_writer is block.mlp.down


class Experts(nn.Module):
    """Experts in one parameter, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("bld,edf,ble->blf", x, self.up, weights)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.shared = nn.Linear(WIDTH, 3), Experts(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.gate(x).softmax(-1)) + self.shared(x)


def test_router_is_found_and_the_whole_mixture_writes() -> None:
    blocks = [Block(), Block()]
    for block in blocks:
        block.mlp = Mixture()
    model = Stack(*blocks)
    for found, block in zip(find_structure(model).blocks, blocks, strict=True):
        assert found.router == (f"{found.name}.mlp.gate", block.mlp.gate)
        assert found.feed_forward_writer is block.mlp
    watched = train_watched(model, None, 1, lambda m, s: m(torch.randn(2, 5, WIDTH)).square().mean())
    assert watched.history.facts.routers == ("layers.0.mlp.gate", "layers.1.mlp.gate")


# Lists of sublayers ---------------------------------------------------------------------------------------------------


class Lists(nn.Module):
    """Layers as lists of sublayers, which the model adds to the stream; a norm and a head after them."""

    def __init__(self, depth: int = 3, nested: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            if nested:  # as in x-transformers
                norms = nn.ModuleList([nn.LayerNorm(WIDTH)])
                self.layers.append(nn.ModuleList([norms, Attention()]))
                self.layers.append(nn.ModuleList([nn.ModuleList([nn.LayerNorm(WIDTH)]), FeedForward()]))
            else:  # as in vit-pytorch
                normed = [nn.Sequential(nn.LayerNorm(WIDTH), part) for part in (Attention(), FeedForward())]
                self.layers.append(nn.ModuleList(normed))
        self.nested, self.norm, self.head = nested, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        self.streams = [x]
        for layer in self.layers:
            if self.nested:
                (norm,), function = layer
                x = x + function(norm(x))
            else:
                for part in layer:
                    x = x + part(x)
            if x.requires_grad:
                x.retain_grad()
            self.streams.append(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("nested", [True, False])
def test_list_of_sublayers_is_one_block(nested: bool) -> None:
    torch.manual_seed(0)
    model = Lists(nested=nested)
    x = torch.randn(3, 5, WIDTH)
    watched = train_watched(model, None, 1, lambda m, s: F.cross_entropy(m(x).flatten(0, 1), torch.arange(15) % 7))
    facts, streams = watched.history.facts, model.streams
    assert facts.blocks == tuple(f"layers.{at}" for at in range(len(model.layers)))
    assert {norm.block for norm in facts.norms} == {*range(len(model.layers)), None}
    assert watched.history.placement == "pre"
    outputs, pairs = streams[1:], list(zip(streams[1:], streams[:-1], strict=True))
    close_to(signal(watched, "stream_rms"), [y.detach().square().mean().sqrt() for y in outputs])
    close_to(signal(watched, "branch_ratio"), [(y - x).detach().norm() / x.detach().norm() for y, x in pairs])
    close_to(signal(watched, "stream_grad"), [y.grad.square().mean().sqrt() for y in outputs])


def test_training_with_lists_is_unchanged_and_evaluations_are_not_counted() -> None:
    def run(watching: bool) -> tuple[list[Tensor], Any]:
        torch.manual_seed(0)
        model = Lists()
        optimizer = adamw(model)

        def loss_of(m: nn.Module, step: int) -> Tensor:
            with torch.no_grad():
                m(torch.full((2, 3, WIDTH), 1e3))
            x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(step))
            return m(x).square().mean()

        if watching:
            watched = train_watched(model, optimizer, 4, loss_of, every=2)
            return [p.detach() for p in model.parameters()], watched
        for step in range(1, 5):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()], None

    (with_watch, watched), (without, _) = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(with_watch, without, strict=True))
    assert all(value < 10 for value in signal(watched, "stream_rms"))


class OneMatrix(nn.Module):
    """A residual block with a single linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)


def test_blocks_with_one_matrix_are_blocks() -> None:
    assert names(Stack(OneMatrix(), OneMatrix())) == [["layers.0", "layers.1"]]
