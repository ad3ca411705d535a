"""Eigenvalues, density and trace of one network's Hessian: kronfac beside PyHessian and hessian-eigenthings.

    python -m bench.spectrum sweep       --settings settings.json   # the peers' best certified settings
    python -m bench.spectrum eigenvalues --settings settings.json   # top 20 by turns, at those settings
    python -m bench.spectrum density                                # 60 Lanczos steps per probe
    python -m bench.spectrum traces                                 # products at equal error
    python -m bench.spectrum all --json spectrum.json

Network: "lenet" (default), 279,908 parameters: convolutions 1-16-32 of 3×3, max-pooling, linear layers 512-526-10,
ReLU; "conv", 280,962 parameters, most of the arithmetic in convolutions: 1-32-64-128 with two max-poolings, linear
layers 512-360-10. Trained for 300 steps of SGD on scikit-learn's digits. The Hessian is that of the mean cross entropy
of the first 200 images (as many as PyHessian's own example takes), the same for all, in float32 and eval mode, in one
process.

Certified
---------

A setting counts if every pair that it returns has ‖Hv - λv‖ <= tol |λ₁| (v normalised, λ as returned; H by a product
of this bench's own, in float64), and if the values, sorted by magnitude, are those of scipy's Lanczos on that product,
each to tol |λ₁|: a second copy of an eigenvalue, or one missed, shows there. The peers' options are swept and the
fastest certified setting of each peer is raced; what the sweep spent is not counted, nor that they do not know
beforehand how many steps are enough. kronfac has its defaults, with the time it takes to find out that it is done and
to bound its own residuals; the line "all copies" also looks for further copies of repeated eigenvalues, which no peer
does, and measures the residuals.

Traces are compared by products: the error of XTrace and Hutch++ over several seeds, and how many products Hutchinson's
estimator needs for the same error (its variance per probe is measured). The traces are known: of a matrix with
eigenvalues 1/k², and of the network's Gauss-Newton matrix (per-example gradients, nothing of kronfac).

Peers are optional: one that is not installed is named and left out. PyHessian calls torch.eig, which torch has no
longer: torch.linalg.eigh takes its place while it runs.
"""
