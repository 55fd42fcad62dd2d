"""The experiments of the paper (arXiv 2411.01800) that need no download, each with the paper's figure beside ours."""
