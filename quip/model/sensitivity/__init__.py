"""What the loss of a model feels of its matrices: one pass forward and back, before any is changed.

With y = W x at token t and g_t = d loss / d y_t, the loss that rounding W to W + D adds is about

    1/2 E[(g_t^T D x_t)^2]  ~  1/2 (1/m) tr(D E[s_t x_t x_t^T] D^T),     s_t = |g_t|^2

(GuidedQuant, arXiv 2505.07004, with one group of rows). So the second moments of inputs are taken
with the weights s_t. Labels y_t that are drawn from the model's own predictions make the expected
loss the Kullback-Leibler divergence of the rounded model from this one, whose Hessian at D = 0 is
the Fisher information; those of the data make it what GuidedQuant calls the same.

What the loss feels of output i is f_i = E[|x_t|^2 g_ti^2], by which outputs are rescaled
(quip.transforms.rescale).
"""
