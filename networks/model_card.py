"""Write the model card (README.md) of CLIP weights from their config: what they are, what they saw, how to load them, their limits."""
from __future__ import annotations

from collections.abc import Mapping

from networks.encoder_specs import ENCODERS

TEMPLATE = """---
tags: [spatial-transcriptomics, histology, contrastive-learning]
---
# Gene expression and H&E patches in one embedding space

A CLIP: expression of a spot and the {patch_px} px H&E patch around it become unit rows of {projection} numbers; a high cosine means that
they belong together. The genes' side conditions image generators.

| | |
|---|---|
| gene encoder | {gene_encoder} |
| image encoder | {image_encoder} |
| temperature | {temperature} |
| trained on | {data} |
| expression | {n_genes:,} genes, library size {target_sum}, log1p |
| weights chosen | {chosen} |

{retrieval}
## Load

```python
from networks.clip import CLIP

clip = CLIP.from_pretrained("FOLDER", image_encoder=False)       # genes alone
clip = CLIP.from_pretrained("FOLDER", image_encoder_weights=FILE)   # and patches
```

or `python clip_embeddings.py --network FOLDER --gex gex_filt.h5ad --images patches --out-dir embeddings`. Expression must hold exactly
the genes of `config.json`, in their order. The image encoder is not part of these weights: {where}.

## Limits

For research, not for diagnosis. Trained on the samples above alone: other organs, species, stains, scanners and platforms are untested, and
embeddings carry what separates samples besides biology. {by_sample}Spots of neighbouring sections of one patient are near copies: retrieval
measured on such is not retrieval on another patient.
"""


def model_card(description: Mapping) -> str:
    """Markdown for the `description` of a CLIP (`networks.clip.CLIP.description`). Names no path of the machine it was trained on."""
    model, record = description["model"], description["training"]
    spec = ENCODERS.get(model["image_encoder"])
    licence = f"its licence: {spec.licence}" if spec else "see its own licence"
    samples = record.get("samples", [])
    spots = f"{record['n_spots']:,} spots of {len(samples)} samples: {', '.join(samples[:20])}" if samples else "not recorded"
    sets = f", {len(description['gene_sets']):,} gene sets" if description["gene_sets"] else ""
    return TEMPLATE.format(
        patch_px=record.get("patch_px", "square"), projection=model["projection"], gene_encoder=f"{model['gene_encoder']}{sets}",
        image_encoder=f"{model['image_encoder']}, frozen, {description['feature_width']} features; {licence}",
        temperature=f"learned, from {model['temperature']:g}" if model["learn_temperature"] else f"{model['temperature']:g}",
        data=spots, n_genes=len(description["gene_names"]), target_sum=description["target_sum"],
        by_sample=_by_sample(model), chosen=record.get("chosen", "not recorded"), retrieval=_retrieval(record.get("retrieval")),
        where=f"get it from {spec.where}" if spec else f"any {model['image_encoder']} file")


def _by_sample(model: Mapping) -> str:
    sides = [side for side, name in (("genes", "gene_sample_scaling"), ("patches", "feature_sample_scaling")) if model[name] != "none"]
    return f"Its {' and '.join(sides)} are scaled within their sample: embed whole samples, not single spots. " if sides else ""


def _retrieval(found: Mapping | None) -> str:
    """A table of `evaluation.retrieval.both_ways` with the number of spots and the names of the validation samples."""
    if not found:
        return "Retrieval was not measured: there was no validation sample.\n"
    rows = [f"| {way.replace('_', ' ')} | {numbers['r1']:.3f} | {numbers['r5']:.3f} | {numbers['r10']:.3f} "
            f"({numbers['r10_ci95'][0]:.3f}-{numbers['r10_ci95'][1]:.3f}) | {numbers['median_rank']:g} |"
            for way, numbers in found.items() if way in ("gene_to_image", "image_to_gene")]
    head = (f"Retrieval among {found['n_spots']:,} validation spots of {', '.join(found['samples'])} "
            f"(chance R@10 {found['gene_to_image']['chance_r10']:.3f}):\n\n| | R@1 | R@5 | R@10 (95 %) | median rank |\n"
            "|---|---|---|---|---|\n")
    return head + "\n".join(rows) + "\n"
