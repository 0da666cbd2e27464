// The samples of one evaluation as thumbnails, a slider through all of them, one at full size.

import { element } from "./dom.js"

export class Gallery {
    #strip = element("div", "strip")
    #slider = element("input", "slider", { type: "range", min: 0, step: 1 })
    #caption = element("span", "caption")
    #shown = "" // what the strip holds
    #large = null

    // pick(index): the slider was moved to that evaluation; -1: to the right end.
    constructor(pick) {
        this.#slider.setAttribute("aria-label", "Evaluation to look at")
        this.#slider.addEventListener("input", () => {
            const { value, max } = this.#slider
            pick(value === max ? -1 : Number(value)) // there may be more by now than were drawn
        })
        const row = element("div", "row")
        row.append(this.#slider, this.#caption)
        this.element = element("div", "gallery")
        this.element.append(this.#strip, row)
    }

    // evaluations: of the history; index: the one looked at; sampled: the one whose samples are
    // shown; address(name): of a sample, or null.
    draw(evaluations, index, sampled, address) {
        this.#slider.max = String(Math.max(0, evaluations.length - 1))
        this.#slider.value = String(index)
        this.#slider.disabled = evaluations.length < 2
        this.#caption.textContent = said(evaluations[index].step)
        const addresses = sampled.samples.map(address).filter(Boolean)
        const key = addresses.join("\n")
        if (key === this.#shown) return
        this.#shown = key
        const made = addresses.map((_, i) => this.#thumbnail(addresses, i, sampled.step))
        // the old ones stay until the new ones can be seen
        Promise.allSettled(made.map((button) => button.firstChild.decode())).then(() => {
            if (key === this.#shown) this.#strip.replaceChildren(...made)
        })
    }

    close() {
        this.#large?.close()
    }

    #thumbnail(addresses, index, step) {
        const label = `Sample ${index + 1} of ${addresses.length} at ${said(step)}`
        const title = `${label}: show it large`
        const button = element("button", "thumbnail", { type: "button", title })
        const image = element("img", "", { src: addresses[index], alt: label, draggable: false })
        image.addEventListener("error", () => button.classList.add("missing"))
        button.append(image)
        button.addEventListener("click", () => this.#enlarge(addresses, index, step))
        return button
    }

    // A dialog of the page's own: Esc and a click close it, arrow keys turn the leaves.
    #enlarge(addresses, index, step) {
        this.close()
        const dialog = element("dialog", "personalize-sample")
        const image = element("img")
        const caption = element("div")
        const turn = (by) => {
            index = (index + by + addresses.length) % addresses.length
            image.src = addresses[index]
            image.alt = `Sample ${index + 1} of ${addresses.length} at ${said(step)}`
            caption.textContent = image.alt
        }
        turn(0)
        dialog.append(image, caption)
        dialog.addEventListener("click", () => dialog.close())
        dialog.addEventListener("keydown", (event) => {
            event.stopPropagation() // not a shortcut of the graph's
            if (event.key === "ArrowRight") turn(1)
            if (event.key === "ArrowLeft") turn(-1)
        })
        dialog.addEventListener("close", () => {
            dialog.remove()
            this.#large = null
        })
        document.body.append(dialog)
        this.#large = dialog
        dialog.showModal()
    }
}

function said(step) {
    return `step ${step.toLocaleString("en")}`
}
