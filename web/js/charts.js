// Three plots over the same steps, with one cursor: losses, drift and corruption, gamma per bin.

import uPlot from "./vendor/uPlot.esm.js"
import { BINS, figure, isNumber } from "./history.js"

const ZOOM = 2 // plots are drawn larger, and scaled down by the style sheet: nodes can be zoomed in
const SIDE = 38 * ZOOM // left and right of the plots, so that their steps stand above each other
const FONT = `${10 * ZOOM}px system-ui, sans-serif`
const UNSTEADY = 20 // steps before the running mean means something

let count = 0

export class Charts {
    #plots = {}
    #colour
    #hover
    #pick
    #history = null
    #picked = null
    #sync = `personalize-${++count}`

    // places: {losses, drift, gamma} elements; colour(name): a CSS colour of the theme now;
    // hover(step or null, bin or null) as the pointer moves; pick(step) when it clicks.
    constructor(places, colour, hover, pick) {
        this.#colour = colour
        this.#hover = hover
        this.#pick = pick
        const make = (name, options) => (this.#plots[name] = this.#make(places[name], options))
        make("losses", {
            scales: { y: { range: () => this.#lossRange() } },
            axes: [this.#axis(3, figure)],
            series: [
                this.#line("loss", "y", { width: ZOOM }),
                this.#line("train", "y", { spanGaps: true }),
                this.#line("held", "y", { spanGaps: true }),
            ],
            right: SIDE,
        })
        make("drift", {
            scales: {
                drift: { range: (_, low, high) => around(low, high, 0, 0.02) },
                corruption: { range: (_, low, high) => around(low, high, 1, 0.02) },
            },
            axes: [
                this.#axis(3, (v) => `${Math.round(100 * v)}%`, "drift", "prior"),
                this.#axis(1, (v) => v.toFixed(2), "corruption", "corruption"),
            ],
            series: [
                this.#line("prior", "drift", { spanGaps: true }),
                this.#line("corruption", "corruption", { spanGaps: true }),
            ],
            right: null,
        })
        make("gamma", {
            scales: { y: { range: () => [0, BINS] } },
            axes: [
                {
                    ...this.#axis(3, null),
                    splits: () => [BINS / 20, BINS - BINS / 20],
                    values: () => ["low t", "high t"],
                    grid: { show: false },
                    ticks: { show: false },
                },
            ],
            series: [this.#line("loss", "y", { show: false })],
            right: SIDE,
            before: (plot) => this.#heat(plot),
            steps: true,
        })
    }

    // Draw a run. picked: the step of the evaluation looked at, or null.
    draw(history, picked) {
        this.#history = history
        this.#picked = picked
        this.#plots.losses.setData(lossData(history))
        const drift = history.series((line) => line.prior_drift)
        const corruption = history.series((line) => line.corruption)
        this.#plots.drift.setData([drift[0], drift[1], corruption[1]])
        this.#plots.gamma.setData(history.series(() => null))
        for (const plot of Object.values(this.#plots)) fit(plot)
    }

    destroy() {
        for (const plot of Object.values(this.#plots)) plot.destroy()
    }

    #make(place, { scales, axes, series, right, before, steps }) {
        const x = {
            ...this.#axis(2, (v) => v.toLocaleString("en")),
            scale: "x",
            size: (steps ? 18 : 6) * ZOOM,
            values: (_, splits) => splits.map((v) => (steps ? v.toLocaleString("en") : "")),
            space: 50 * ZOOM,
            incrs: [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5].map((e) => n * 10 ** e)),
        }
        const options = {
            width: 300 * ZOOM,
            height: 60 * ZOOM,
            legend: { show: false },
            padding: [4 * ZOOM, right, 0, null],
            scales: {
                x: { time: false, range: () => [0, Math.max(2, this.#history?.step ?? 0)] },
                ...scales,
            },
            axes: [x, ...axes],
            series: [{}, ...series],
            cursor: {
                drag: { x: false, y: false, click: () => {} }, // else it swallows clicks
                y: false,
                points: { size: 5 * ZOOM },
                move: unscaled,
                sync: { key: this.#sync, scales: ["x", null] },
            },
            hooks: {
                drawClear: before ? [before] : [],
                draw: [(plot) => this.#marks(plot)],
                setCursor: [(plot) => this.#hovered(plot)],
            },
        }
        const plot = new uPlot(options, [[], ...series.map(() => [])], place)
        plot.over.addEventListener("click", () => {
            if (plot.cursor.left >= 0) this.#pick(plot.posToVal(plot.cursor.left, "x"))
        })
        return plot
    }

    #line(colour, scale, more) {
        const stroke = () => this.#colour(colour)
        const points = { show: sparse, size: 4 * ZOOM, fill: stroke }
        return { scale, stroke, width: 1.75 * ZOOM, points, ...more }
    }

    #axis(side, value, scale = "y", colour = "muted") {
        return {
            scale,
            side,
            size: SIDE,
            gap: 3 * ZOOM,
            font: FONT,
            space: 18 * ZOOM,
            stroke: () => this.#colour(colour),
            grid: { show: side !== 1, stroke: () => this.#colour("grid"), width: ZOOM },
            ticks: { show: false },
            values: value && ((_, splits) => splits.map(value)),
        }
    }

    // Where the losses lie: the noise of the first steps does not count.
    #lossRange() {
        const { evaluations = [], steps = [], smooth = [] } = this.#history ?? {}
        const stable = evaluations.flatMap((line) => [line.train, line.held_out])
        const steady = smooth.filter((value, i) => isNumber(value) && steps[i] > UNSTEADY)
        const seen = [...stable, ...(steady.length ? steady : smooth)].filter(isNumber)
        const low = seen.reduce((a, b) => Math.min(a, b), Infinity)
        const high = seen.reduce((a, b) => Math.max(a, b), -Infinity)
        if (low > high) return [0, 1]
        const room = 0.08 * (high - low) || 0.1 * high || 0.1
        return [Math.max(0, low - room), high + room]
    }

    // Fill a cell per evaluation and bin, each reaching half way to its neighbours.
    #heat(plot) {
        const lines = (this.#history?.evaluations ?? []).filter((line) => Array.isArray(line.gamma))
        const { ctx, bbox } = plot
        ctx.save()
        lines.forEach((line, i) => {
            const from = i ? (lines[i - 1].step + line.step) / 2 : 0
            const next = lines[i + 1]?.step
            const to = next === undefined ? this.#history.step : (line.step + next) / 2
            const left = Math.round(plot.valToPos(from, "x", true))
            const right = Math.round(plot.valToPos(Math.max(to, from + 0.5), "x", true))
            for (let bin = 0; bin < BINS; bin++) {
                if (!isNumber(line.gamma[bin])) continue
                const top = Math.round(bbox.top + (bbox.height * (BINS - 1 - bin)) / BINS)
                const bottom = Math.round(bbox.top + (bbox.height * (BINS - bin)) / BINS)
                ctx.fillStyle = heatColour(line.gamma[bin])
                ctx.fillRect(left, top, Math.max(1, right - left), bottom - top)
            }
        })
        ctx.restore()
    }

    // Upright lines: the best step, the evaluation looked at, and notches at pinned steps.
    #marks(plot) {
        const history = this.#history
        if (!history) return
        const { ctx, bbox } = plot
        const at = (step) => Math.round(plot.valToPos(step, "x", true)) + 0.5
        ctx.save()
        ctx.lineWidth = pixels()
        const upright = (step, colour, dash) => {
            ctx.beginPath()
            ctx.moveTo(at(step), bbox.top)
            ctx.lineTo(at(step), bbox.top + bbox.height)
            if (plot === this.#plots.gamma) {
                ctx.strokeStyle = "black" // else it is lost on the strip's own yellow
                ctx.setLineDash([])
                ctx.stroke()
            }
            ctx.strokeStyle = this.#colour(colour)
            ctx.setLineDash(dash.map((length) => length * pixels()))
            ctx.stroke()
        }
        if (isNumber(this.#picked)) upright(this.#picked, "text", [])
        if (history.bestStep !== null) upright(history.bestStep, "best", [4, 3])
        if (plot === this.#plots.losses) this.#flags(ctx, bbox, at)
        ctx.restore()
    }

    #flags(ctx, { left, top, width, height }, at) {
        const size = 5 * pixels()
        ctx.setLineDash([])
        ctx.fillStyle = this.#colour("best")
        for (const step of this.#history.facts.pinned.filter(isNumber)) {
            ctx.beginPath()
            ctx.moveTo(at(step) - size, top + height)
            ctx.lineTo(at(step) + size, top + height)
            ctx.lineTo(at(step), top + height - 1.4 * size)
            ctx.fill()
        }
        if (this.#history.bestStep === null) return
        const x = at(this.#history.bestStep)
        const isRight = x > left + width - 34 * pixels()
        ctx.font = `600 ${10 * pixels()}px system-ui, sans-serif`
        ctx.textAlign = isRight ? "right" : "left"
        ctx.textBaseline = "top"
        ctx.fillText("best", x + (isRight ? -4 : 4) * pixels(), top + pixels())
    }

    #hovered(plot) {
        const { left, top, event } = plot.cursor
        if (left === undefined || left < 0) return this.#hover(null, null)
        if (!event) return // the others follow the one under the pointer
        const bin = Math.floor(plot.posToVal(top, "y"))
        const onHeat = plot === this.#plots.gamma && bin >= 0 && bin < BINS
        this.#hover(plot.posToVal(left, "x"), onHeat ? bin : null)
    }
}

// The three lines of the first plot over the union of their steps.
function lossData(history) {
    const tables = [
        history.losses(),
        history.series((line) => line.train),
        history.series((line) => line.held_out),
    ]
    return uPlot.join(tables, [[0, 1], [0, 0], [0, 0]]) // 1: left-out steps are gaps in the line
}

// Give a plot the size of its place; resize only when that changed.
function fit(plot) {
    const { clientWidth, clientHeight } = plot.root.parentElement
    const [width, height] = [ZOOM * clientWidth, ZOOM * clientHeight]
    if (!width || !height) return
    if (width !== plot.width || height !== plot.height) plot.setSize({ width, height })
}

// The pointer's place in the plot: the page draws nodes scaled, which uPlot does not know.
function unscaled(plot, left, top) {
    const event = plot.cursor.event
    if (left < 0 || !event) return [left, top]
    const { left: x, top: y, width } = plot.over.getBoundingClientRect()
    const scale = width / plot.over.offsetWidth || 1
    return [(event.clientX - x) / scale, (event.clientY - y) / scale]
}

// Canvas pixels per pixel of the node.
function pixels() {
    return ZOOM * devicePixelRatio
}

// Dots mark evaluations while they stand apart; the line of single steps has none.
function sparse(plot, index) {
    const shown = plot.data[index].filter((value) => value !== null && value !== undefined)
    return shown.length > 0 && shown.length <= 40
}

// A range that holds `base` and is not narrower than `least`.
function around(low, high, base, least) {
    const [bottom, top] = [Math.min(low ?? base, base), Math.max(high ?? base, base)]
    const room = Math.max(0.1 * (top - bottom), least / 2)
    return [bottom - room, top + room]
}

// Dark violet to yellow, as people know it from viridis; reads alike in grey.
const STOPS = [
    [68, 1, 84],
    [59, 82, 139],
    [33, 145, 140],
    [94, 201, 98],
    [253, 231, 37],
]

export function heatColour(value) {
    const place = Math.min(1, Math.max(0, value)) * (STOPS.length - 1)
    const lower = Math.min(STOPS.length - 2, Math.floor(place))
    const next = STOPS[lower + 1]
    const mixed = STOPS[lower].map((c, i) => Math.round(c + (place - lower) * (next[i] - c)))
    return `rgb(${mixed.join(" ")})`
}
