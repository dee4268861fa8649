"""What do attention heads do? Record, measure, choose honestly, draw, report.

record             watch_attention, record_attention: the attention of a network while it runs
sources            samples to inspect: windows of a dataset, or images
measures           of attention weights, as pure functions
correspondence     attention scored against true places
head_statistics    the measures of every head over all samples
glossary           types of heads, and what measures mean
importance         heads ablated one by one, and more and more of them
choose             intervals, and heads chosen on one half of the samples and reported on the other
draw, page         pictures, and the interactive page
report             summary.md, table.csv, W&B
inspection         inspect_attention: all of these, in this order
"""
