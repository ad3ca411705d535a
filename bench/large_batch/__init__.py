"""Large batches on MNIST: fixed (BL), linearly scaled (FB), growing (GG), and adapted to the Hessian (ABS, ABSA).

    python -m bench.large_batch run --data-dir ../shared/data/mnist --workers 2 --threads 1
    python -m bench.large_batch report
    python -m bench.large_batch draw

`run` makes all runs that are missing, as many at a time as there are workers, each pinned to processors of its own;
`report` prints the tables and `draw` makes the figure. Each run is a process and ends as one JSON file. Whatever stops
it (`--budget`, Ctrl-C, a kill), the same command goes on: finished runs are not made again, an unfinished one continues
from its checkpoint bit for bit and counts for nothing until it is finished.
Exit status: 0 all is done, 1 failed, 2 bad usage, 3 there is more to do.

What is compared
----------------

* Network: two convolutions of stride 2 and two linear layers, 52,000 parameters, ReLU, no normalisation. Data: MNIST,
  standardised, all 60,000 training examples (`--examples` takes the first ones only); accuracy on the 10,000 of the
  test split.
* SGD with momentum 0.9 and weight decay 5e-4. Everything that is set lies in `bench/large_batch/settings.py`, and is
  the same for all methods: base rate and base batch, epochs, the epochs before which the rate decays by 0.2.
* BL (the baseline): batch B, the base rate. FB: batch B, rate times B/128 after a linear warm-up. GG: from 128 to at
  most B, growing where the rate would decay. ABS: from 128 to at most B, doubled (and the rate with it) when the top
  Hessian eigenvalue has halved or after two epochs. ABSA: ABS with FGSM examples in each small batch, a share of 0.2
  that falls as the batch grows, and is 0 from half of the epochs on. The schedules are those of `kronfac.schedules`.
* Four B, three seeds (of the initial weights and of the order of the examples), and BL at the base batch, which the
  others are compared with.
* Updates are steps of the optimizer. A run whose loss is no longer finite has diverged and ends there.
* At the end: test accuracy; the top Hessian eigenvalue of the training loss over a fixed sample, with its residual;
  accuracy on test examples after FGSM, and after ten projected steps (PGD) on the first thousand of them.
* Clock: steps and decisions, with the eigenvalue computations among them and measured apart. Evaluations, checkpoints
  and the reading of data are outside.

What differs from the published runs (Yao, Gholami, Keutzer & Mahoney, arXiv:1810.01021) is the scale: 16 epochs instead
of 90, so that the batch grows after 2 epochs at the latest instead of 10, and ε of FGSM, which is in units of pixels in
[0, 1] of digits here. Directions can be compared, figures cannot.
"""
