// What a training node shows of its run. Knows the history and the page, not the graph.

import { Charts } from "./charts.js"
import { element } from "./dom.js"
import { Gallery } from "./gallery.js"
import { BINS, duration, figure, isNumber, percent } from "./history.js"

const IDLE = "The chart appears here as it trains."
const COLOURS = {
    loss: "--pm-loss",
    train: "--pm-train",
    held: "--pm-held",
    prior: "--pm-prior",
    corruption: "--pm-corruption",
    best: "--pm-best",
    grid: "--pm-grid",
    text: "--pm-text",
    muted: "--pm-muted",
}
const PLOTS = {
    losses: "Losses by step",
    drift: "Prior drift and corruption by step",
    gamma: "Over-fitting indicator by step and timestep",
}
const HEIGHTS = { idle: 26, plain: 176, full: 344, samples: 94, buttons: 29, text: 19 } // px
const TIPS = {
    loss: "Loss of single steps, smoothed: mostly the luck of the timestep.",
    train: "Loss on the training pictures, at fixed timesteps and noise.",
    "held-out": "The same on pictures of the subject that are not trained on. Lowest is best.",
    "prior drift": "How much worse the class is known than by the base.",
    corruption: "Grain left in nearly clean training pictures, over what the base leaves: 1 is as it.",
    grain:
        "Of the samples, over that of the base's; without prompts, of the training pictures'. " +
        "A hump is the stage of corrupted pictures.",
    at: "The step that these samples are of.",
    likeness: "Of the samples to the training picture most like each: near 1 they are copies.",
    diversity: "How much the samples of one prompt differ: near 0 they are all the same.",
}
const GAMMA = "How much better than the base the training pictures are known, by timestep: 0 to 1."
const PATIENCE = "Patience: evaluations without a new best, after which the training ends."
const BASE = "Step 0 is the base: it needs no pin."
const STOP = "End after this step; keep the best checkpoint and the last, and go on with the graph."

export class View {
    #actions
    #charts = null
    #parts = {}
    #picked = null // the step of the evaluation looked at; null follows the newest
    #pointed = [null, null] // step and bin under the pointer
    #run = null
    #history = null
    #secondsLeft = null
    #message = ""
    #observer = new ResizeObserver(() => this.#draw())

    // actions: {stop(), pin(step or null), sample(run, name, created), resized()}
    constructor(actions) {
        this.#actions = actions
        this.element = element("div", "personalize-monitor")
        const part = (name, tag = "div", properties = {}) => {
            this.#parts[name] = element(tag, name, properties)
            return this.#parts[name]
        }
        const head = element("div", "head")
        head.append(part("state", "span"), part("run", "span"), part("progress", "span"))
        const second = element("div", "head")
        second.append(part("verdict", "span"), part("at", "span"))
        this.gallery = new Gallery((index) => this.#pick(index))
        this.#parts.gallery = this.gallery.element
        const buttons = part("buttons")
        const button = (name, textContent, title) =>
            part(name, "button", { type: "button", textContent, title })
        buttons.append(
            button("stop", "Stop and keep", STOP),
            button("pin", "Pin this checkpoint", ""),
        )
        part("message").setAttribute("role", "status")
        this.element.append(
            part("idle"),
            head,
            second,
            part("note"),
            part("readLosses"),
            part("losses"),
            part("readDrift"),
            part("drift"),
            part("readGamma"),
            part("gamma"),
            part("readSamples"),
            this.gallery.element,
            buttons,
            this.#parts.message,
        )
        for (const name of ["readLosses", "readDrift", "readGamma", "readSamples"])
            this.#parts[name].classList.add("read")
        for (const [name, label] of Object.entries(PLOTS)) {
            this.#parts[name].classList.add("plot")
            this.#parts[name].setAttribute("role", "img")
            this.#parts[name].setAttribute("aria-label", label)
        }
        this.#parts.stop.addEventListener("click", () => this.#ask("stop"))
        this.#parts.pin.addEventListener("click", () => this.#ask("pin"))
        this.idle()
    }

    // Pixels that the content needs at least; more goes to the losses.
    get height() {
        const history = this.#history
        if (!history || history.isEmpty) return HEIGHTS.idle
        const charts = history.evaluations.length ? HEIGHTS.full : HEIGHTS.plain
        const samples = history.sampled(0) ? HEIGHTS.samples : 0
        const buttons = history.isTraining ? HEIGHTS.buttons : 0
        const texts = [this.#note, this.#message].filter(Boolean).length
        return charts + samples + buttons + texts * HEIGHTS.text
    }

    // Show that there is nothing to show, and why.
    idle(text = IDLE) {
        this.#run = this.#history = this.#picked = null
        this.#parts.idle.textContent = text
        this.#draw()
    }

    // Show a run; secondsLeft: until the last step, or null where nobody knows.
    show(run, history, secondsLeft) {
        if (run !== this.#run) this.#picked = null
        if (run !== this.#run || !history.isTraining) this.#message = ""
        this.#run = run
        this.#history = history
        this.#secondsLeft = secondsLeft
        if (history.isEmpty) this.#parts.idle.textContent = `${run}: ${history.state}`
        this.#draw()
    }

    // Say how a wish went, below the buttons.
    say(text) {
        this.#message = text
        this.#draw()
    }

    // Draw again, because the theme changed.
    redraw() {
        this.#draw()
    }

    // Start to follow the size of the element; `rest` ends that, and frees the charts.
    wake() {
        this.#observer.observe(this.element)
    }

    rest() {
        this.#observer.disconnect()
        this.gallery.close()
        this.#charts?.destroy()
        this.#charts = null
    }

    #makeCharts() {
        const style = getComputedStyle(this.element)
        return new Charts(
            this.#parts,
            (name) => style.getPropertyValue(COLOURS[name]) || "gray",
            (step, bin) => this.#point(step, bin),
            (step) => this.#pick(this.#history?.nearest(step) ?? -1),
        )
    }

    get #index() {
        const evaluations = this.#history?.evaluations ?? []
        if (this.#picked === null) return evaluations.length - 1
        return this.#history.nearest(this.#picked)
    }

    #pick(index) {
        const evaluations = this.#history?.evaluations ?? []
        const line = evaluations.at(index)
        if (!line) return
        this.#picked = line === evaluations.at(-1) ? null : line.step
        this.#draw()
    }

    #point(step, bin) {
        this.#pointed = [step, bin]
        this.#read()
    }

    async #ask(wish) {
        if (wish === "pin" && this.#picked === 0) return this.say(BASE)
        const button = this.#parts[wish]
        button.disabled = true
        try {
            await this.#actions[wish](this.#picked)
        } catch (error) {
            this.say(error.message)
        }
        button.disabled = false
    }

    #draw() {
        const history = this.#history
        const has = history && !history.isEmpty
        const evaluated = has && history.evaluations.length > 0
        this.element.classList.toggle("is-idle", !has)
        this.element.classList.toggle("is-plain", !!has && !evaluated)
        if (this.element.style.minHeight !== `${this.height}px`) {
            this.element.style.minHeight = `${this.height}px`
            this.#actions.resized()
        }
        if (!has) return
        this.#head()
        if (!this.element.clientWidth) return // out of sight: drawn when its size changes
        const sampled = history.sampled(this.#index)
        this.#parts.gallery.hidden = this.#parts.readSamples.hidden = !sampled
        this.#parts.buttons.hidden = !history.isTraining
        this.#parts.message.hidden = !this.#message
        this.#parts.message.textContent = this.#parts.message.title = this.#message
        if (sampled) {
            const address = (name) => this.#actions.sample(this.#run, name, history.facts.created)
            this.gallery.draw(history.evaluations, this.#index, sampled, address)
        }
        const kept = this.#picked === null ? "the next step" : `step ${this.#picked}`
        this.#parts.pin.title =
            this.#picked === 0 ? BASE : `Keep the checkpoint of ${kept} for good.`
        this.#charts ??= this.#makeCharts()
        this.#charts.draw(history, this.#picked)
        this.#read()
    }

    #head() {
        const { state, run, progress, verdict, note } = this.#parts
        const history = this.#history
        state.textContent = history.state
        state.dataset.state = history.state
        run.textContent = run.title = [history.facts.title, this.#run].filter(Boolean).join(" · ")
        const [step, total] = [history.step, history.totalSteps].map((n) => n.toLocaleString("en"))
        const left = this.#secondsLeft
        const until = left === null ? "" : ` · ${duration(left)} left`
        progress.textContent = history.isTraining ? `${step} / ${total}${until}` : `${step} steps`
        verdict.replaceChildren(...this.#verdict())
        verdict.title = `${verdict.textContent}. ${PATIENCE}`
        note.textContent = note.title = this.#note
        note.hidden = !note.textContent
    }

    // How it stands, the word for it first, as texts and elements.
    #verdict() {
        const history = this.#history
        const newest = history.newest
        if (!newest) return ["Connect a Monitor for held-out loss, drift, samples."]
        const words = []
        const best = history.bestStep
        if (best !== null) words.push(`best at ${best.toLocaleString("en")}`)
        if (history.isTraining && isNumber(newest.patience_left))
            words.push(`patience ${newest.patience_left}`)
        if (!newest.verdict) return [words.join(" · ")]
        const word = element("span", "word", { textContent: newest.verdict })
        word.dataset.word = word.textContent
        return [word, ...words.map((text) => ` · ${text}`)]
    }

    // What there is to say of a run that has no best step, or not all of its steps and samples.
    get #note() {
        const { newest, keepsLast, isHeldOut, leftOut } = this.#history
        const why = isHeldOut ? "" : "nothing held out: "
        const count = leftOut === 1 ? "1 step" : `${leftOut.toLocaleString("en")} steps`
        const words = []
        if (newest && keepsLast) words.push(`${why}the last step is kept`)
        if (leftOut) words.push(`${count} left out: not finite`)
        if (typeof newest?.samples_failed === "string") words.push(newest.samples_failed)
        return words.join(" · ")
    }

    // Write the values at the pointer, else of the evaluation looked at, else the newest ones.
    #read() {
        const history = this.#history
        if (!history || history.isEmpty) return
        const [pointed, bin] = this.#pointed
        const wanted = pointed ?? this.#picked ?? history.step
        const line = history.evaluations[history.nearest(wanted)]
        const step = line?.step ?? Math.round(Math.min(Math.max(0, wanted), history.step))
        this.#parts.at.textContent = `step ${step.toLocaleString("en")}`
        write(this.#parts.readLosses, [
            ["loss", "loss", history.lossAt(step), figure],
            ["train", "train", line?.train, figure],
            ["held", "held-out", line?.held_out, figure],
        ])
        if (!line) return
        write(this.#parts.readDrift, [
            ["prior", "prior drift", line.prior_drift, percent],
            ["corruption", "corruption", line.corruption, two],
        ])
        const gamma = Array.isArray(line.gamma) ? line.gamma.filter(isNumber) : []
        const mean = gamma.reduce((a, b) => a + b, 0) / gamma.length
        const [from, to] = [(100 * bin) / BINS, (100 * (bin + 1)) / BINS]
        const at = bin === null ? "on average" : `at t ${from}–${to} %`
        write(this.#parts.readGamma, [
            ["heat", `γ ${at}`, bin === null ? mean : line.gamma?.[bin], two],
        ])
        const sampled = history.sampled(history.evaluations.indexOf(line))
        const older = sampled === line ? null : sampled?.step
        write(this.#parts.readSamples, [
            ["", "at", older, (step) => step.toLocaleString("en")],
            ["", "likeness", sampled?.nearest, two],
            ["", "diversity", sampled?.diversity, two],
            ["", "grain", sampled?.grain, two],
        ])
    }
}

function two(value) {
    return value.toFixed(2)
}

// Write [colour, label, value, how to say it] entries, each with a dash of its line's colour; a
// value that is no number is left out.
function write(place, entries) {
    const known = entries.filter(([, , value]) => isNumber(value))
    place.replaceChildren(
        ...known.map(([colour, label, value, say]) => {
            const title = colour === "heat" ? GAMMA : (TIPS[label] ?? "")
            const entry = element("span", "entry", { title })
            if (colour) {
                const dash = element("i")
                dash.dataset.colour = colour
                entry.append(dash)
            }
            entry.append(element("span", "label", { textContent: label }))
            entry.append(element("b", "", { textContent: say(value) }))
            return entry
        }),
    )
}
