// The pack's routes. ComfyUI's own `api` adds the prefix, the user and the session.

const SAMPLE = /^samples\/([A-Za-z0-9][A-Za-z0-9._-]{0,99}\.png)$/

export class Client {
    #api

    constructor(api) {
        this.#api = api
    }

    // Lines from byte `from` on, and the run's facts; null when there is no such run.
    async history(run, from) {
        const reply = await this.#api.fetchApi(`${path(run)}/history?from=${from}`)
        if (reply.status === 404) return null
        if (!reply.ok) throw new Error(`the server answered ${reply.status}`)
        return await reply.json()
    }

    // Each node's newest run since the server started.
    async latest() {
        const reply = await this.#api.fetchApi("/personalize/runs")
        return reply.ok ? (await reply.json()).runs : []
    }

    // Ask for something ("stop" or "pin"). Throws an Error in words for people.
    async ask(run, wish, body = {}) {
        const options = { method: "POST", body: JSON.stringify(body) }
        options.headers = { "Content-Type": "application/json" }
        const reply = await this.#api.fetchApi(`${path(run)}/${wish}`, options)
        const answer = await reply.json().catch(() => ({}))
        if (!reply.ok) throw new Error(answer.error ?? `The server answered ${reply.status}.`)
        return answer
    }

    // The address of a sample as the history names it; null for what is no sample.
    // `created` keeps the pictures of a folder that was made anew apart.
    sample(run, name, created) {
        const file = typeof name === "string" ? name.match(SAMPLE)?.[1] : null
        if (!file) return null
        const address = `${path(run)}/samples/${encodeURIComponent(file)}`
        return this.#api.apiURL(`${address}?created=${encodeURIComponent(created)}`)
    }
}

function path(run) {
    return `/personalize/runs/${encodeURIComponent(run)}`
}
