"""Graph networks of PyTorch Geometric; batches of graphs travel as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.architecture import Architecture, Library

pyg = Library("torch_geometric.nn")
NODES, FEATURES, CLASSES, GRAPHS = 64, 8, 3, 8
Batch = tuple[Any, Any]


def edges() -> Tensor:
    """A ring in each graph, and chords at random: every node has neighbours."""
    size = NODES // GRAPHS
    nodes = torch.arange(NODES)
    first = nodes // size * size
    ring = torch.stack([nodes, first + (nodes + 1) % size])
    chords = torch.stack([nodes, first + torch.randint(0, size, (NODES,))])
    return torch.cat([ring, ring.flip(0), chords], 1)


def classes_of_nodes() -> Batch:
    return (torch.randn(NODES, FEATURES), edges()), torch.randint(0, CLASSES, (NODES,))


def classes_of_graphs() -> Batch:
    graph = torch.arange(GRAPHS).repeat_interleave(NODES // GRAPHS)
    return (torch.randn(NODES, FEATURES), edges(), graph), torch.randint(0, CLASSES, (GRAPHS,))


def atoms() -> Batch:
    graph = torch.arange(GRAPHS).repeat_interleave(NODES // GRAPHS)
    return (torch.randint(1, 9, (NODES,)), 2 * torch.randn(NODES, 3), graph), torch.randn(GRAPHS, 1)


class Residual(nn.Module):
    """DeepGCN as its authors train it: pre-activation layers of GENConv."""

    def __init__(self, depth: int = 8, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList(
            pyg.DeepGCNLayer(
                pyg.GENConv(width, width, aggr="softmax", learn_t=True), nn.LayerNorm(width), nn.ReLU(inplace=True)
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.encoder(x)
        for layer in self.layers:
            x = layer(x, edge_index)
        return self.head(self.layers[0].act(self.layers[0].norm(x)))


class Stack(nn.Module):
    """Convolutions of one kind with a norm each, pooled over each graph."""

    def __init__(self, *convolutions: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, width)
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in convolutions)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, graph: Tensor) -> Tensor:
        x = self.encoder(x)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = functional.relu(norm(convolution(x, edge_index)))
        return self.head(pyg.global_mean_pool(x, graph))


class Global(nn.Module):
    """GPS: local messages beside attention over the whole graph."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, width)
        self.bonds = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(
            pyg.GPSConv(
                width, pyg.GINEConv(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))), heads=2
            )
            for _ in range(3)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, graph: Tensor) -> Tensor:
        x = self.encoder(x)
        bonds = self.bonds.expand(edge_index.shape[1], -1)
        for layer in self.layers:
            x = layer(x, edge_index, graph, edge_attr=bonds)
        return self.head(pyg.global_mean_pool(x, graph))


def pna() -> nn.Module:
    degrees = torch.tensor([0, 0, 4, 8, 16, 16, 8, 8])
    scalers = ["identity", "amplification", "attenuation"]
    return Stack(*(pyg.PNAConv(16, 16, ["mean", "max", "std"], scalers, degrees, towers=2) for _ in range(2)))


def attentive_fp() -> nn.Module:
    return pyg.AttentiveFP(FEATURES, 16, CLASSES, edge_dim=4, num_layers=2, num_timesteps=2)


def attentive_batch() -> Batch:
    (x, edge_index, graph), target = classes_of_graphs()
    return (x, edge_index, torch.randn(edge_index.shape[1], 4), graph), target


class Neighbours(nn.Module):
    """Edges shorter than 5 within each graph and their lengths: a radius graph needs a wheel of its own."""

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        distance = torch.cdist(pos, pos)
        close = (distance < 5) & (batch[:, None] == batch) & ~torch.eye(len(pos), dtype=torch.bool)
        edge_index = close.nonzero().T
        return edge_index, (pos[edge_index[0]] - pos[edge_index[1]]).norm(dim=-1)


def schnet() -> nn.Module:
    return pyg.SchNet(16, 16, num_interactions=2, num_gaussians=10, cutoff=5.0, interaction_graph=Neighbours())


CROSS = functional.cross_entropy


def basic(kind: type[nn.Module], **options: Any) -> nn.Module:
    return kind(FEATURES, 16, 3, CLASSES, **options)


ARCHITECTURES = (
    Architecture("torch_geometric/GCN", "graph", lambda: basic(pyg.GCN), classes_of_nodes, CROSS, daily=True),
    Architecture("torch_geometric/GraphSAGE", "graph", lambda: basic(pyg.GraphSAGE), classes_of_nodes, CROSS),
    Architecture("torch_geometric/GAT", "graph", lambda: basic(pyg.GAT, heads=2), classes_of_nodes, CROSS),
    Architecture("torch_geometric/GIN", "graph", lambda: basic(pyg.GIN, norm="batch_norm"), classes_of_nodes, CROSS),
    Architecture("torch_geometric/EdgeCNN", "graph", lambda: basic(pyg.EdgeCNN), classes_of_nodes, CROSS),
    Architecture("torch_geometric/GCN, jumping", "graph", lambda: basic(pyg.GCN, jk="cat"), classes_of_nodes, CROSS),
    Architecture("torch_geometric/DeepGCN", "graph", Residual, classes_of_nodes, CROSS),
    Architecture("torch_geometric/PNA", "graph", pna, classes_of_graphs, CROSS),
    Architecture(
        "torch_geometric/GATv2",
        "graph",
        lambda: Stack(*(pyg.GATv2Conv(16, 8, heads=2) for _ in range(3))),
        classes_of_graphs,
        CROSS,
    ),
    Architecture(
        "torch_geometric/TransformerConv",
        "graph",
        lambda: Stack(*(pyg.TransformerConv(16, 8, heads=2, beta=True) for _ in range(3))),
        classes_of_graphs,
        CROSS,
    ),
    Architecture("torch_geometric/GPS", "graph", Global, classes_of_graphs, CROSS),
    Architecture("torch_geometric/AttentiveFP", "graph", attentive_fp, attentive_batch, CROSS),
    Architecture("torch_geometric/SchNet", "graph", schnet, atoms, functional.mse_loss),
)
