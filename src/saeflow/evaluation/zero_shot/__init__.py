"""Zero-shot classification of images through all, or only a few, of an SAE's concepts.

Each image becomes the class whose text it is nearest to, by cosine; an accuracy is the mean over classes
of the share of their images that are right. The text of a class is the mean of its unit text embeddings
over the templates.
"""

from saeflow.evaluation.zero_shot.labelled_sets import LabelledSets, write_labelled

__all__ = ["LabelledSets", "write_labelled"]
