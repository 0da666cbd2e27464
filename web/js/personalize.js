// Puts a monitor into every training node, and brings it what the server tells.

import { app } from "../../../scripts/app.js"
import { api } from "../../../scripts/api.js"
import { Client } from "./client.js"
import { History } from "./history.js"
import { View } from "./view.js"

const TRAINING = "PersonalizeTrain"
const EVENT = "personalize.run"
const PROPERTY = "personalize_run" // in node.properties: the run that the node shows
const WIDGET = "monitor"
const LEAST_WIDTH = 340 // px of a node that shows a chart
const MARGIN = 10 // px around the widget, in classic nodes
const PAUSE = 400 // ms between two readings at least
const NO_ID = "00000000-0000-0000-0000-000000000000" // of a graph that has none of its own yet
const PATIENCE = 5000 // ms without an event, after which a run that goes on is read anyway

const client = new Client(api)
const monitors = new Set() // of the nodes in the page's graph
const latest = new Map() // what the server told last, by workflow and node
let executed = null // the id of the node that the server executes for this page

class Monitor {
    #node
    #run = null
    #history = new History()
    #next = 0 // byte of history.jsonl
    #timer = null
    #reading = false
    #poked = false
    #view = null
    #pace = []

    constructor(node) {
        this.#node = node
        this.#view = new View({
            stop: () => this.#stop(),
            pin: (step) => this.#pin(step),
            sample: (run, name, created) => client.sample(run, name, created ?? ""),
            resized: () => this.#grow(),
        })
        const widget = node.addDOMWidget(WIDGET, "personalize_monitor", this.#view.element, {
            serialize: false,
            hideOnZoom: false,
            margin: MARGIN,
            getMinHeight: () => this.#view.height + 2 * MARGIN,
        })
        widget.serialize = false // neither in the prompt nor among the workflow's widget values
        passToCanvas(this.#view.element)
    }

    get node() {
        return this.#node
    }

    get run() {
        return this.#run
    }

    // Show a run, or none.
    show(run) {
        if (run === this.#run) return
        this.#run = run
        this.#forget()
        if (run) this.poke()
        else this.#view.idle()
    }

    // Something happened: read on, soon.
    poke() {
        this.#poked = true
        if (!this.#reading) this.#later(0)
    }

    redraw() {
        this.#view.redraw()
    }

    open() {
        monitors.add(this)
        this.#view.wake()
        this.show(this.#node.properties[PROPERTY] ?? null)
        if (this.#run) this.poke()
    }

    close() {
        monitors.delete(this)
        clearTimeout(this.#timer)
        this.#view.rest()
    }

    #forget() {
        this.#history = new History()
        this.#next = 0
        this.#pace = []
    }

    #later(pause) {
        clearTimeout(this.#timer)
        if (monitors.has(this)) this.#timer = setTimeout(() => this.#read(), pause)
    }

    async #read() {
        const run = this.#run
        if (!run || this.#reading) return
        this.#reading = true
        this.#poked = false
        try {
            const found = await this.#readAll(run)
            if (run === this.#run) this.#show(run, found)
        } catch (error) {
            if (run === this.#run && this.#history.isEmpty)
                this.#view.idle(`${run}: no answer (${error.message})`)
        }
        this.#reading = false
        if (this.#poked || run !== this.#run) this.#later(PAUSE)
        else if (this.#history.facts.running) this.#later(PATIENCE)
    }

    // Read up to the end. False when there is no such run (any more).
    async #readAll(run) {
        for (;;) {
            const answer = await client.history(run, this.#next)
            if (answer === null) return false
            if (run !== this.#run) return true
            const { lines, next, ...facts } = answer
            const known = this.#history.facts.created
            if (known !== undefined && known !== facts.created) {
                this.#forget() // the folder was deleted, and made anew
                continue
            }
            this.#history.facts = facts
            this.#history.add(lines)
            if (next === this.#next) return true
            this.#next = next
        }
    }

    #show(run, found) {
        if (!found) {
            this.#forget()
            this.#view.idle(`The run '${run}' is not there any more.`)
            return
        }
        this.#view.show(run, this.#history, this.#secondsLeft())
    }

    // From the steps of the last half minute; before that, from the evaluations.
    #secondsLeft() {
        const history = this.#history
        if (!history.isTraining) return null
        const now = performance.now() / 1000
        this.#pace = [...this.#pace.filter(([time]) => time > now - 30), [now, history.step]]
        const [[time, step]] = this.#pace
        const seen = history.step - step
        const pace = seen > 0 && now - time > 3 ? (now - time) / seen : history.pace
        return pace === null ? null : pace * Math.max(0, history.totalSteps - history.step)
    }

    async #stop() {
        await client.ask(this.#run, "stop")
        this.#view.say("It ends after this step; the graph goes on.")
    }

    async #pin(step) {
        await client.ask(this.#run, "pin", step === null ? {} : { step })
        this.#view.say(step === null ? "The next step will be kept." : `Step ${step} will be kept.`)
        this.poke()
    }

    // Give the chart its room when it appears; never take any away.
    #grow() {
        const node = this.#node
        if (!node.graph || !this.#run) return
        // "Nodes 2.0" grow with what is in them, and leave out the advanced inputs
        const [width, height] = LiteGraph.vueNodesMode ? [0, 0] : node.computeSize()
        const wanted = [Math.max(node.size[0], width, LEAST_WIDTH), Math.max(node.size[1], height)]
        if (wanted[0] > node.size[0] || wanted[1] > node.size[1]) node.setSize(wanted)
        app.canvas?.setDirty(true, true)
    }
}

// Let the wheel zoom and the middle button move the canvas, as beside the widget.
function passToCanvas(element) {
    const isVue = () => element.closest("[data-node-id]") !== null
    element.addEventListener("wheel", (event) => {
        if (!isVue()) app.canvas.processMouseWheel(event)
    })
    element.addEventListener("pointerdown", (event) => {
        if (event.button === 1 && !isVue()) app.canvas.processMouseDown(event)
    })
}

function rootGraph() {
    return app.rootGraph ?? app.graph
}

// Find a node by its id in execution: "12", or "7:12" inside the subgraph node 7.
function findNode(id) {
    let [graph, node] = [rootGraph(), null]
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part))
        graph = node?.subgraph
    }
    return node ?? null
}

// Whether what the server tells is about this node. Nodes have the same ids in many workflows, and
// workflows have the same id when they were made from one template: so the name has to fit, too,
// unless this page sees the run go on: then the node was given another name since.
function isAbout({ run, node: id, workflow }, node, isNews) {
    if (node.properties[PROPERTY] === run) return true
    if (workflow === rootGraph().id)
        return mayBeCalled(node, run) || (isNews && executed === id && countOpen(workflow) < 2)
    const isElsewhere = workflow !== null && (workflow !== NO_ID || countOpen(NO_ID) > 0)
    if (isElsewhere || (!isNews && node.properties[PROPERTY])) return false
    return mayBeCalled(node, run)
}

// How many of the workflows that are open have an id.
function countOpen(id) {
    const open = app.extensionManager?.workflow?.openWorkflows ?? []
    return open.filter((workflow) => workflow.activeState?.id === id).length
}

// Whether a run may be this node's by its name.
function mayBeCalled(node, run) {
    const name = node.widgets?.find((widget) => widget.name === "name")?.value
    const inputs = node.inputs ?? []
    const isLinked = inputs.some((input) => input.widget?.name === "name" && input.link !== null)
    return isLinked || typeof name !== "string" || isNumbered(run, name)
}

// Whether a run is called `name`, or that with a number because the name was taken.
function isNumbered(run, name) {
    if (run === name) return true
    const [, stem] = run.match(/^(.*) \d+$/) ?? []
    return stem !== undefined && (stem === name || (stem.length > 60 && name.startsWith(stem)))
}

// Let a node show what the server tells of it: just now (news), or before.
function attribute(shown, isNews = false) {
    const node = findNode(shown.node)
    const monitor = [...monitors].find((monitor) => monitor.node === node)
    if (!monitor || !isAbout(shown, node, isNews)) return
    if (node.properties[PROPERTY] !== shown.run) {
        node.properties[PROPERTY] = shown.run
        remember()
    }
    monitor.show(shown.run)
    return monitor
}

// Let the page keep the workflow as it is now, for a reload.
function remember() {
    app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.captureCanvasState?.()
}

async function askForLatest() {
    const shown = await client.latest().catch(() => [])
    for (const each of shown) latest.set(`${each.workflow} ${each.node}`, each)
    for (const each of latest.values()) attribute(each)
}

function install(node) {
    const monitor = new Monitor(node)
    const after = (name, act) => {
        const before = node[name]
        node[name] = function (...values) {
            const result = before?.apply(this, values)
            act(...values)
            return result
        }
    }
    after("onAdded", () => monitor.open())
    after("onRemoved", () => monitor.close())
    after("onConfigure", (info) => {
        const isCopy = info.id === undefined || info.id === null || Number(info.id) === -1
        if (isCopy) delete node.properties[PROPERTY] // it has not been trained
        monitor.show(node.properties[PROPERTY] ?? null)
    })
}

app.registerExtension({
    name: "personalize.monitor",

    init() {
        const link = document.createElement("link")
        link.rel = "stylesheet"
        for (const file of ["vendor/uPlot.min.css", "monitor.css"]) {
            const sheet = link.cloneNode()
            sheet.href = new URL(file, import.meta.url).href
            document.head.append(sheet)
        }
    },

    setup() {
        api.addEventListener(EVENT, ({ detail }) => {
            latest.set(`${detail.workflow} ${detail.node}`, detail)
            attribute(detail, true)?.poke()
        })
        api.addEventListener("executing", ({ detail }) => (executed = detail))
        const each = (act) => monitors.forEach(act)
        api.addEventListener("reconnected", () => each((monitor) => monitor.poke()))
        const redraw = () => each((monitor) => monitor.redraw())
        const themes = new MutationObserver(() => requestAnimationFrame(redraw))
        themes.observe(document.body, { attributeFilter: ["class"] })
        themes.observe(document.documentElement, { attributeFilter: ["style", "class"] })
    },

    nodeCreated(node) {
        if (node.comfyClass?.startsWith(TRAINING)) install(node)
    },

    async afterConfigureGraph() {
        await askForLatest()
    },
})
