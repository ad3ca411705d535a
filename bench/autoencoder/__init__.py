"""The MNIST autoencoder race: K-FAC, EKFAC, SGD + Nesterov and Adam on one network, in seconds and in steps.

    python -m bench.autoencoder grid  --data-dir ../shared/data/mnist --methods sgd,adam --budget 55
    python -m bench.autoencoder final --data-dir ../shared/data/mnist
    python -m bench.autoencoder report
    python -m bench.autoencoder draw

`grid` makes each method's tuning runs, `final` runs the best two settings of each again for longer, `report` prints the
comparison and `draw` makes the figure. Each run is a process of its own on as many processors as it has threads, and
ends as one JSON file. Whatever stops it (`--budget`, Ctrl-C, a kill), the same command goes on: finished runs are not
made again, an unfinished one continues from its checkpoint bit for bit and counts for nothing until it is finished.
Exit status: 0 all is done, 1 failed, 2 bad usage, 3 there is more to do.

What is raced
-------------

* Network (Hinton & Salakhutdinov 2006): 784-1000-500-250-30-250-500-1000-784, sigmoid units, a linear code. The same
  initial weights for all: 15 incoming weights per unit from N(0, 1), all others and the biases 0 (Martens 2010).
* Data: the 60,000 training images, pixels in [0, 1]; a new permutation per epoch, the same for all.
* Loss: Bernoulli cross-entropy summed over pixels and averaged over images, and η/2 ‖θ‖² with η = 1e-5 (Martens &
  Grosse, arXiv:1503.05671, section 13).
* Error: squared reconstruction error per image, summed over pixels and averaged over all 60,000, of the network and
  of its averaged iterate; at each evaluation the lower of the two counts. The average's horizon is 100,000 images for
  every method, which is Martens & Grosse's weight 0.99 at batch 1000.
* Clock: from taking a batch to the end of the step, the average's update included; evaluations (8 in a tuning run, 40
  in a final one, and 4 early ones), checkpoints, and the calibration are outside. Arithmetic flushes denormal numbers
  to 0 for every method: saturated sigmoids make them, and a first-order step then takes three times as long.
* Rate schedule: one form for all. Constant for the first half of the steps, then linearly to 0. How many steps there
  are is planned before the run, from a calibration of five seconds on a copy, so that they fill 95 % of the run's
  time; the plan is recorded. A KL clip bounds the squared length of a step, so that its bound follows the square of
  the schedule. The adaptive mode has no rate and no schedule.
* Batches: 200 for SGD (Sutskever et al. 2013 on this network), 100 to 500 for Adam, 250 to 2000 for K-FAC (Martens &
  Grosse begin with 1000 and let it grow). The comparison in steps is therefore one of steps of different size; the one
  in seconds is free of that.
* SGD has Nesterov momentum μ_t = min(1 - 2^(-1 - log2(floor(t/250) + 1)), μ_max) (Sutskever et al. 2013), Adam
  torch's own constants. Both are torch's fused versions, the fastest there are.
* Tuning: 13 settings for SGD and Adam (9 rates, with other momenta or batches), and as many for K-FAC of what matters
  to it (batch, damping, momentum, KL clip, rate, frequencies); 4 for EKFAC and the adaptive mode. All settings are in
  `bench/autoencoder/settings.py`. Before they were fixed, trials of 20 to 100 processor seconds looked for their
  ranges: 17 of K-FAC, 4 of SGD, 5 of Adam. These are not among the tuning runs that the report counts. The last five
  of K-FAC and Adam and the last three of SGD were added when the best of K-FAC's first eight had the least damping.

A run whose threads waited for a processor for more than a tenth of its time, that used less than half of the
processors it was given, or whose plan did not fit its time, is disturbed: it is set aside and made again
(`--retries`), and marked in the report if that is disturbed as well.
"""
