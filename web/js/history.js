// A run's history: what history.jsonl says, as series to draw and words to show. No DOM here.

const MEMORY = 0.98 // of the running mean over the loss of single steps
const MOST_POINTS = 800 // of the line of single steps: more than a node has pixels
export const BINS = 10 // timestep bins, low t first

const REASONS = {
    finished: "finished",
    "stopped early": "stopped early",
    "stopped by hand": "stopped",
    interrupted: "cancelled",
    failed: "failed",
}

export class History {
    constructor() {
        this.steps = [] // of the lines of single steps
        this.smooth = [] // the running mean of their loss; null where a step was left out
        this.leftOut = 0 // steps, because their loss or its gradient was not finite
        this.evaluations = []
        this.end = null
        this.facts = { title: "", total_steps: null, running: false, pinned: [] }
        this.#mean = this.#weight = 0
    }

    #mean
    #weight

    // Take lines of history.jsonl, oldest first.
    add(lines) {
        for (const line of lines) {
            if (line.end) this.end = line
            else if (!isCount(line.step)) continue
            else if (line.evaluation) this.#addEvaluation(line)
            else if (isNumber(line.learning_rate)) this.#addStep(line)
        }
    }

    #addEvaluation(line) {
        while (this.evaluations.length && this.evaluations.at(-1).step >= line.step)
            this.evaluations.pop() // the run went on from an earlier step
        this.evaluations.push(line)
        this.end = null
    }

    #addStep({ step, loss }) {
        while (this.steps.length && this.steps.at(-1) >= step) {
            this.steps.pop()
            this.leftOut -= this.smooth.pop() === null
        }
        this.steps.push(step)
        this.smooth.push(isNumber(loss) ? this.#meanWith(loss) : null)
        this.leftOut += !isNumber(loss)
        this.end = null
    }

    #meanWith(loss) {
        this.#mean = MEMORY * this.#mean + (1 - MEMORY) * loss
        this.#weight = MEMORY * this.#weight + (1 - MEMORY)
        return this.#mean / this.#weight
    }

    get isEmpty() {
        return !this.steps.length && !this.evaluations.length
    }

    get newest() {
        return this.evaluations.at(-1)
    }

    get step() {
        return Math.max(0, this.steps.at(-1) ?? 0, this.newest?.step ?? 0, this.end?.step ?? 0)
    }

    get totalSteps() {
        return this.newest?.total_steps ?? this.facts.total_steps ?? this.step
    }

    // The best step; null where there is none to tell, as where simply the last one is kept.
    get bestStep() {
        const step = this.end?.best_step ?? this.newest?.best_step
        return isCount(step) && !this.keepsLast ? step : null
    }

    // Whether any loss on held-out pictures was measured.
    get isHeldOut() {
        return this.evaluations.some((line) => isNumber(line.held_out))
    }

    // Whether the last step is kept: by the monitor's rules, or for want of held-out pictures.
    get keepsLast() {
        const rule = this.evaluations.find((line) => line.rules)?.rules.best
        return rule !== "train" && (rule === "last" || !this.isHeldOut)
    }

    get isTraining() {
        return Boolean(this.facts.running) && !this.end
    }

    // What the run is at, in one word or two.
    get state() {
        if (this.end) return REASONS[this.end.reason] ?? "ended"
        if (this.isTraining) return "training"
        return this.isEmpty ? "no history" : "broken off" // the server ended with the training
    }

    // The line of single steps, thinned to what can be seen: [steps, values].
    losses() {
        const stride = Math.ceil(this.steps.length / MOST_POINTS) || 1
        const last = this.steps.length - 1
        const kept = this.steps.map((_, i) => i).filter((i) => (last - i) % stride === 0)
        const since = (i) => this.smooth.slice(Math.max(0, i - stride + 1), i + 1)
        const values = kept.map((i) => since(i).findLast(isNumber) ?? null)
        return [kept.map((i) => this.steps[i]), values]
    }

    // A number of the evaluations: [steps, values], null where there is none.
    series(read) {
        const values = this.evaluations.map((line) => number(read(line)))
        return [this.evaluations.map((line) => line.step), values]
    }

    // The running mean after `step`: of the newest steps up to it that were not left out.
    lossAt(step) {
        return this.smooth.slice(0, lastUpTo(this.steps, step) + 1).findLast(isNumber) ?? null
    }

    // The index of the evaluation nearest to `step`, or -1.
    nearest(step) {
        let best = -1
        this.evaluations.forEach((line, i) => {
            const distance = Math.abs(line.step - step)
            if (best < 0 || distance <= Math.abs(this.evaluations[best].step - step)) best = i
        })
        return best
    }

    // The evaluation whose samples there are to see at an index: that, or the newest before it.
    sampled(index) {
        const upTo = this.evaluations.slice(0, index + 1)
        return upTo.findLast(hasSamples) ?? this.evaluations.find(hasSamples) ?? null
    }

    // Seconds per step so far, as the evaluations tell; null before the second one.
    get pace() {
        const timed = this.evaluations.filter((line) => isNumber(line.seconds))
        const [first, last] = [timed.at(0), timed.at(-1)]
        if (!last || last.step <= first.step) return null
        return (last.seconds - first.seconds) / (last.step - first.step)
    }
}

// Numbers in a few digits: 0.1234, 12.3, 1,234.
export function figure(value) {
    if (!isNumber(value)) return "–"
    if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1)
    const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 4
    const shown = { maximumFractionDigits: digits, minimumFractionDigits: Math.min(digits, 3) }
    return value.toLocaleString("en", shown)
}

export function percent(value) {
    if (!isNumber(value)) return "–"
    const digits = Math.abs(value) < 0.1 ? 1 : 0
    return `${value > 0 ? "+" : ""}${(100 * value).toFixed(digits)} %`.replace("-", "−")
}

export function duration(seconds) {
    if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`
    const minutes = Math.round(seconds / 60)
    if (minutes < 60) return `${minutes} min`
    return `${Math.floor(minutes / 60)} h ${minutes % 60} min`
}

export function isNumber(value) {
    return typeof value === "number" && Number.isFinite(value)
}

function hasSamples(line) {
    return Array.isArray(line.samples) && line.samples.length > 0
}

function isCount(value) {
    return Number.isInteger(value) && value >= 0
}

function number(value) {
    return isNumber(value) ? value : null
}

// The index of the last of ascending numbers that is not above `limit`, or -1.
function lastUpTo(numbers, limit) {
    let [low, high] = [0, numbers.length]
    while (low < high) {
        const middle = (low + high) >> 1
        if (numbers[middle] <= limit) low = middle + 1
        else high = middle
    }
    return low - 1
}
