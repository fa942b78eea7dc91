"""The kernels: strided pointers and sizes in, no torch.

Pixels are the rows and neurons (or channels, in the gradient) the columns of every tile. What one
pixel reads under each tap of the filter is found from its own row and column, so no matrix of
patches is ever written: implicit GEMM.

`*_pixel` strides are for pixels numbered row by row. With WIDE, offsets have 64 bits instead of 32.
"""

import triton
import triton.language as tl


@triton.jit
def _product(
    source,  # pointer, moved to each tile row's sample: (ROWS,)
    row,  # row and column that each tile row reads under the first tap: (ROWS,)
    column,
    valid,
    height,
    width,
    terms,  # what is summed over besides taps: channels, or neurons in the gradient
    source_row,  # strides of the source
    source_column,
    source_term,
    weight,  # pointer, moved to the first tap and to each tile column's weights: (COLUMNS,)
    valid_column,
    weight_row,  # strides of the weight from one tap to the next; those of terms are 1
    weight_column,
    taps_high,
    taps_wide,
    row_step,  # how far the source moves from one tap to the next
    column_step,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The tile (ROWS, COLUMNS) of sums over taps and terms, in float32."""
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    blocks = tl.cdiv(terms, TERMS)
    for block in range(taps_high * taps_wide * blocks):
        tap = block // blocks
        tap_row = tap // taps_wide
        tap_column = tap % taps_wide
        term = (block % blocks) * TERMS + tl.arange(0, TERMS)
        valid_term = term < terms
        r = row + tap_row * row_step
        c = column + tap_column * column_step
        inside = valid & (r >= 0) & (r < height) & (c >= 0) & (c < width)
        pixels = source + (r.to(INDEX) * source_row + c.to(INDEX) * source_column)
        a = tl.load(
            pixels[:, None] + (term.to(INDEX) * source_term)[None, :],
            mask=inside[:, None] & valid_term[None, :],
            other=0.0,
        )
        taps = weight + (tap_row * weight_row + tap_column * weight_column)
        b = tl.load(
            taps[None, :] + term[:, None],
            mask=valid_term[:, None] & valid_column[None, :],
            other=0.0,
        )
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _epilogue(
    sums,
    y,  # pointers, moved to each tile row's pixel: (ROWS,)
    u,
    mask,
    scale,
    shift,
    bias,
    residual,
    sample,
    neuron,
    valid,
    neurons,
    y_neuron,  # strides
    residual_neuron,
    PER_SAMPLE: tl.constexpr,
    RELU: tl.constexpr,
    INDEX: tl.constexpr,
):
    """What becomes of a tile of sums."""
    valid_neuron = neuron < neurons
    valid_tile = valid[:, None] & valid_neuron[None, :]
    wide_neuron = neuron.to(INDEX)[None, :]
    if u is not None:
        tl.store(u[:, None] + wide_neuron, sums, mask=valid_tile)
    if scale is not None:
        sums *= tl.load(scale + neuron, mask=valid_neuron, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        sums += tl.load(shift + neuron, mask=valid_neuron, other=0.0).to(tl.float32)[None, :]
    if PER_SAMPLE:
        masks = mask + (sample * neurons)[:, None] + wide_neuron
        sums *= tl.load(masks, mask=valid_tile, other=0.0).to(tl.float32)
    elif mask is not None:
        sums *= tl.load(mask + neuron, mask=valid_neuron, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        sums += tl.load(bias + neuron, mask=valid_neuron, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        tile = residual[:, None] + wide_neuron * residual_neuron
        sums += tl.load(tile, mask=valid_tile, other=0.0).to(tl.float32)
    if RELU:
        sums = tl.where(sums <= 0, 0.0, sums)  # a NaN stays one
    tl.store(y[:, None] + wide_neuron * y_neuron, sums.to(y.dtype.element_ty), mask=valid_tile)


@triton.jit
def conv_forward(
    x,
    weight,
    y,
    u,
    mask,
    scale,
    shift,
    bias,
    residual,
    batch,
    channels,
    height,
    width,
    neurons,
    out_height,
    out_width,
    x_sample,
    x_channel,
    x_row,
    x_column,
    y_sample,
    y_neuron,
    y_pixel,
    residual_sample,
    residual_neuron,
    residual_pixel,
    stride_row,
    stride_column,
    padding_row,
    padding_column,
    dilation_row,
    dilation_column,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Computes y, and u in channels-last if it is given."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    column_blocks = tl.cdiv(neurons, COLUMNS)
    # Neighbouring programs share their pixels, which are more than the weights.
    pixel = (tl.program_id(0) // column_blocks).to(INDEX) * ROWS + tl.arange(0, ROWS)
    neuron_block = tl.program_id(0) % column_blocks
    neuron = neuron_block * COLUMNS + tl.arange(0, COLUMNS)
    out_pixels = out_height * out_width
    sample = pixel // out_pixels
    place = (pixel % out_pixels).to(tl.int32)
    valid = sample < batch

    sums = _product(
        x + sample * x_sample,
        (place // out_width) * stride_row - padding_row,
        (place % out_width) * stride_column - padding_column,
        valid,
        height,
        width,
        channels,
        x_row,
        x_column,
        x_channel,
        weight + neuron.to(INDEX) * (KERNEL_HEIGHT * KERNEL_WIDTH * channels),
        neuron < neurons,
        KERNEL_WIDTH * channels,
        channels,
        KERNEL_HEIGHT,
        KERNEL_WIDTH,
        dilation_row,
        dilation_column,
        PRECISION,
        INDEX,
        ROWS,
        COLUMNS,
        TERMS,
    )

    # In two halves, because the registers do not hold all that the whole tile would need.
    halves = tl.permute(tl.reshape(sums, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)).split()
    for half in tl.static_range(2):
        _epilogue(
            halves[half],
            y + sample * y_sample + place.to(INDEX) * y_pixel,
            None if u is None else u + pixel * neurons,
            mask,
            scale,
            shift,
            bias,
            None
            if residual is None
            else residual + sample * residual_sample + place.to(INDEX) * residual_pixel,
            sample,
            neuron_block * COLUMNS + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2),
            valid,
            neurons,
            y_neuron,
            residual_neuron,
            PER_SAMPLE,
            RELU,
            INDEX,
        )


@triton.jit
def _first_tap(offset, stride, dilation, step, size: tl.constexpr):
    """The smallest tap with (offset - tap * dilation) divisible by stride; `size` if none is."""
    first = step * 0 + size
    for i in range(step):
        tap = step - 1 - i
        first = tl.where((offset - tap * dilation) % stride == 0, tap, first)
    return first


@triton.jit
def conv_grad_input(
    g,
    weight,
    dx,
    batch,
    channels,
    height,
    width,
    neurons,
    out_height,
    out_width,
    g_sample,
    g_neuron,
    g_row,
    g_column,
    dx_sample,
    dx_channel,
    dx_row,
    dx_column,
    stride_row,
    stride_column,
    padding_row,
    padding_column,
    dilation_row,
    dilation_column,
    tap_step_row,  # stride / gcd(stride, dilation): from one tap that hits a gradient to the next
    tap_step_column,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The gradient of x from that of u.

    With a stride, a pixel is reached by some of the taps only. Pixels that are `stride` apart are
    reached by the same ones; program_id(1) is the class of such pixels, which skips the others.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    class_row = tl.program_id(1) // stride_column
    class_column = tl.program_id(1) % stride_column
    class_height = tl.cdiv(height, stride_row)
    class_width = tl.cdiv(width, stride_column)

    column_blocks = tl.cdiv(channels, COLUMNS)
    pixel = (tl.program_id(0) // column_blocks).to(INDEX) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    class_pixels = class_height * class_width
    sample = pixel // class_pixels
    place = (pixel % class_pixels).to(tl.int32)
    i = place // class_width
    j = place % class_width
    row = class_row + i * stride_row
    column = class_column + j * stride_column
    valid = (sample < batch) & (row < height) & (column < width)
    valid_channel = channel < channels
    wide_channel = channel.to(INDEX)

    offset_row = class_row + padding_row
    offset_column = class_column + padding_column
    tap_row = _first_tap(offset_row, stride_row, dilation_row, tap_step_row, KERNEL_HEIGHT)
    tap_column = _first_tap(
        offset_column, stride_column, dilation_column, tap_step_column, KERNEL_WIDTH
    )

    sums = _product(
        g + sample * g_sample,
        i + (offset_row - tap_row * dilation_row) // stride_row,
        j + (offset_column - tap_column * dilation_column) // stride_column,
        valid,
        out_height,
        out_width,
        neurons,
        g_row,
        g_column,
        g_neuron,
        weight
        + wide_channel * (KERNEL_HEIGHT * KERNEL_WIDTH * neurons)
        + (tap_row * KERNEL_WIDTH + tap_column) * neurons,
        valid_channel,
        tap_step_row * KERNEL_WIDTH * neurons,
        tap_step_column * neurons,
        tl.cdiv(KERNEL_HEIGHT - tap_row, tap_step_row),
        tl.cdiv(KERNEL_WIDTH - tap_column, tap_step_column),
        -(tap_step_row * dilation_row // stride_row),
        -(tap_step_column * dilation_column // stride_column),
        PRECISION,
        INDEX,
        ROWS,
        COLUMNS,
        TERMS,
    )

    pixels = dx + sample * dx_sample + row.to(INDEX) * dx_row + column.to(INDEX) * dx_column
    tile = pixels[:, None] + (wide_channel * dx_channel)[None, :]
    tl.store(tile, sums.to(dx.dtype.element_ty), mask=valid[:, None] & valid_channel[None, :])


@triton.jit
def epilogue_backward(
    grad,
    y,
    u,
    mask,
    scale,
    shift,
    g,
    dz,
    sums,
    batch,
    neurons,
    pixels,
    grad_sample,
    grad_neuron,
    grad_pixel,
    y_sample,
    y_neuron,
    y_pixel,
    u_sample,
    u_neuron,
    u_pixel,
    g_sample,
    g_neuron,
    g_pixel,
    mask_sample,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients through the epilogue, in one pass over the output's gradient.

    What is given is written: g of u and dz of the residual, both with g's strides, and per chunk of
    CHUNK pixels and sample the sums of dz, dz * t and dz * u, as (chunks, 3, batch, neurons).
    y is given where a ReLU was applied.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    chunks = tl.cdiv(pixels, CHUNK)
    sample = (tl.program_id(0) // chunks).to(INDEX)
    chunk = tl.program_id(0) % chunks
    neuron = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid_neuron = neuron < neurons
    wide_neuron = neuron.to(INDEX)

    factor = tl.full((COLUMNS,), 1.0, tl.float32)
    if mask is not None:
        factor = tl.load(mask + sample * mask_sample + neuron, mask=valid_neuron, other=0.0)
        factor = factor.to(tl.float32)
    scales = tl.full((COLUMNS,), 1.0, tl.float32)
    if scale is not None:
        scales = tl.load(scale + neuron, mask=valid_neuron, other=0.0).to(tl.float32)
    shifts = tl.zeros((COLUMNS,), dtype=tl.float32)
    if shift is not None:
        shifts = tl.load(shift + neuron, mask=valid_neuron, other=0.0).to(tl.float32)

    sum_dz = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sum_dz_t = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sum_dz_u = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, CHUNK, ROWS):
        pixel = chunk * CHUNK + start + tl.arange(0, ROWS)
        valid = (pixel < pixels)[:, None] & valid_neuron[None, :]
        wide = pixel.to(INDEX)[:, None]
        at = sample * grad_sample + wide * grad_pixel + (wide_neuron * grad_neuron)[None, :]
        d = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        if y is not None:
            at = sample * y_sample + wide * y_pixel + (wide_neuron * y_neuron)[None, :]
            d = tl.where(tl.load(y + at, mask=valid, other=0.0) <= 0, 0.0, d)
        at = sample * g_sample + wide * g_pixel + (wide_neuron * g_neuron)[None, :]
        if dz is not None:
            tl.store(dz + at, d.to(dz.dtype.element_ty), mask=valid)
        if g is not None:
            tl.store(g + at, (d * factor * scales).to(g.dtype.element_ty), mask=valid)
        if sums is not None:
            sum_dz += d
            if u is not None:
                at = sample * u_sample + wide * u_pixel + (wide_neuron * u_neuron)[None, :]
                v = tl.load(u + at, mask=valid, other=0.0).to(tl.float32)
                sum_dz_t += d * (v * scales[None, :] + shifts[None, :])
                sum_dz_u += d * v
    if sums is not None:
        plane = batch * neurons
        at = sums + chunk.to(INDEX) * (3 * plane) + sample * neurons + neuron
        tl.store(at, tl.sum(sum_dz, 0), mask=valid_neuron)
        tl.store(at + plane, tl.sum(sum_dz_t, 0), mask=valid_neuron)
        tl.store(at + 2 * plane, tl.sum(sum_dz_u, 0), mask=valid_neuron)


# Rows, columns, warps and stages of tiles; docs/triton.md says why these.
VECTORS = [(128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 4)]  # where 16 bytes are read at once
ELEMENTS = [(64, 64, 8, 2)]  # where they are not: each element has an address in registers


def _tuned(kernel):
    """The kernel, tuned, for {(whether 16 bytes are read at once, bytes of an element)}."""
    key = [
        "batch",
        "channels",
        "height",
        "width",
        "neurons",
        "stride_row",
        "KERNEL_HEIGHT",
        "KERNEL_WIDTH",
        "PRECISION",
        "WIDE",
    ]

    def tuned(tiles, terms):
        configs = [
            triton.Config({"ROWS": rows, "COLUMNS": columns, "TERMS": terms}, warps, stages)
            for rows, columns, warps, stages in tiles
        ]
        return triton.autotune(configs, key=key, cache_results=True)(kernel)

    # 128 bytes of terms are a line of the cache.
    vectors = {(True, size): tuned(VECTORS, 128 // size) for size in (2, 4)}
    return vectors | {(False, size): tuned(ELEMENTS, 16) for size in (2, 4)}


CONV_FORWARD = _tuned(conv_forward)
CONV_GRAD_INPUT = _tuned(conv_grad_input)
