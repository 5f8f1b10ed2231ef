"""A map of tokens in two dimensions: PCA, then t-SNE."""

import warnings

import numpy as np

COMPONENTS = 50  # of the PCA before t-SNE, as scikit-learn's documentation advises
_PERPLEXITY = 30.0


def token_map(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """rows fp32 [n, keys], which are overwritten -> principal components [n, 50] and places [n, 2], fp32.

    Fewer components where rows or keys are fewer. At least four rows.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count = min(COMPONENTS, *rows.shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "invalid value encountered")  # rows that are all equal
        components = PCA(count, copy=False, svd_solver="randomized", random_state=seed).fit_transform(rows)
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed)
    return components.astype(np.float32), tsne.fit_transform(components).astype(np.float32)
