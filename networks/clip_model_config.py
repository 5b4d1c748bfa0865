"""The settings of a CLIP model: everything that its weights need to be built again. Loads neither torch nor data."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf

from preprocessing.errors import OptionError

PUBLISHED_TEMPERATURE, LEARNED_FROM = 1.0, 0.07   # a fixed temperature; the start value of a learned one
GENE_ENCODERS = ("linear_block", "bottleneck", "hidden", "identity", "gene_tokens", "pathways")
OF_GENES = ("gene_tokens", "pathways")            # encoders that need to know which input is which gene
SCALINGS = ("none", "centre", "standardise")
POOLINGS = ("attention", "mean")


@dataclass
class ClipModelConfig:
    """The published values are the defaults."""

    gene_encoder: str = "linear_block"   # linear_block (published) | bottleneck | hidden | identity | gene_tokens | pathways
    gene_hidden: int = 256               # hidden width of bottleneck and hidden
    gene_width: int = 1024               # width out of linear_block, bottleneck, gene_tokens and pathways
    gene_tokens: int = 256               # gene_tokens: so many genes of highest value are a spot's tokens
    gene_token_width: int = 128          # gene_tokens: width of a token
    gene_token_layers: int = 2           # gene_tokens: transformer layers
    gene_token_heads: int = 4            # gene_tokens: attention heads of a layer
    gene_token_pooling: str = "attention"   # gene_tokens: attention (a learned token reads the genes) | mean over the tokens
    pathways_file: str | None = None     # pathways: gene sets, GMT; read in training alone, their genes travel in the weights
    gene_sample_scaling: str = "none"    # none | centre | standardise: every sample by its own genes, wherever expression is embedded
    gene_scaling: str = "none"           # none | centre | standardise, fitted on the training spots
    gene_components: int = 0             # project expression on this many principal axes of the training spots; 0 = do not
    gene_min_share: float = 0.0          # ignore genes seen in a smaller share of training spots
    gene_dropout: float = 0.0            # share of inputs set to zero in training
    dropout: float = 0.8                 # of gene encoder and gene head
    image_dropout: float = 0.8           # of the image head
    feature_dropout: float = 0.0         # share of image features set to zero in training
    feature_sample_scaling: str = "none"   # none | centre: every sample by its own patches, wherever they are embedded
    feature_scaling: str = "none"        # none | centre | standardise, fitted on the training patches
    feature_components: int = 0          # project image features on this many principal axes; 0 = do not
    projection: int = 512                # D
    residual: bool = True
    layer_norm: bool = False
    linear_heads: bool = False           # one linear layer in place of both projection heads
    image_views: int = 1                 # flips and turns averaged when a patch is embedded after training: 1 or 8
    temperature: float | None = None     # none = 1.0, as published; 0.07 as the start value when it is learned
    learn_temperature: bool = False
    image_encoder: str = "uni"           # a name in networks.encoder_specs, or timm:<model>
    image_encoder_weights: str | None = None   # local weight file; uni: else UNI_STATE_DICT_PATH
    image_encoder_px: int | None = None   # side at which a convolutional tower sees patches; none = its own

    def __post_init__(self):
        if self.temperature is None:
            self.temperature = LEARNED_FROM if self.learn_temperature else PUBLISHED_TEMPERATURE
        for name, choices in (("gene_encoder", GENE_ENCODERS), ("gene_sample_scaling", SCALINGS), ("gene_scaling", SCALINGS),
                              ("feature_scaling", SCALINGS), ("feature_sample_scaling", SCALINGS[:2]),
                              ("gene_token_pooling", POOLINGS), ("image_views", (1, 8))):
            if getattr(self, name) not in choices:
                raise OptionError(f"model.{name}", f"one of {', '.join(map(str, choices))}", str(getattr(self, name)))
        for name in ("gene_dropout", "dropout", "image_dropout", "feature_dropout", "gene_min_share"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"model.{name}", "0 up to 1", str(getattr(self, name)))
        for name in ("gene_hidden", "gene_width", "gene_tokens", "gene_token_width", "gene_token_layers", "gene_token_heads", "projection",
                     "gene_components", "feature_components"):
            least = 0 if name.endswith("_components") else 1
            if getattr(self, name) < least:
                raise OptionError(f"model.{name}", f"at least {least}", str(getattr(self, name)))
        if not 0 < self.temperature < inf:
            raise OptionError("model.temperature", "above 0, finite", str(self.temperature))
        self._check_gene_encoder()

    @property
    def needs_whole_samples(self) -> bool:
        """True if a spot can only be embedded together with its sample."""
        return (self.gene_sample_scaling, self.feature_sample_scaling) != ("none", "none")

    def _check_gene_encoder(self) -> None:
        if self.gene_encoder in OF_GENES and self.gene_components:
            raise OptionError("model.gene_components", f"0: {self.gene_encoder} reads genes, not principal axes", str(self.gene_components))
        if self.gene_token_width % self.gene_token_heads:
            raise OptionError("model.gene_token_width", f"a multiple of model.gene_token_heads={self.gene_token_heads}",
                              str(self.gene_token_width))
        if (self.gene_encoder == "pathways") != bool(self.pathways_file):
            raise OptionError("model.pathways_file", "a GMT file of gene sets with model.gene_encoder=pathways, and with no other",
                              f"{self.pathways_file or 'none'} with model.gene_encoder={self.gene_encoder}")


def different_settings(trained: Mapping, config: ClipModelConfig) -> list[str]:
    """Names under which a saved model's settings differ. One it lacks is of a later version, whose default leaves the model as it was;
    where files lay is no part of a model: their contents are compared by hash."""
    settings = asdict(ClipModelConfig()) | dict(trained)
    return [f"model.{name}" for name, value in asdict(config).items()
            if settings.get(name) != value and name not in ("image_encoder_weights", "pathways_file")]
